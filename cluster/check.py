"""What is wrong with a layout, as far as can be known without starting anything or asking anyone.

A launcher finds a misspelt name at its own time: Ray's after the first machine is paid for, KubeRay's never. So every
name is held against what will read it: Ray's schema and the options of its commands, Amazon's and Google's own models
of a machine, as their client libraries bring them, and `cluster.names` for the rest. Then what must hold of any layout
of ours: nothing unset, nothing secret, nothing open to the world, a head without GPUs, workers within their bounds.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray.autoscaler
import yaml
from ray import _raylet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_commands

from cluster import names
from cluster.site import UNSET, unset
from hdml_core.errors import did_you_mean

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = (
    "PYTHONPATH",
    "RAY_AUTH_MODE",
    "RAY_ADDRESS",
    "HDML_DATA",
    "HDML_OUT",
    "HDML_LEDGER",
    "MLFLOW_TRACKING_URI",
)
"""What studies need in the environment of every node."""
OPTIONAL = ("HDML_ARCHIVES",)
SECRETS = {
    "a password in an address": re.compile(r"\w://[^\s/:@\"']+:[^\s/@\"']+@"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token": re.compile(r"\b[0-9a-f]{40,}\b|(?:TOKEN|PASSWORD|SECRET)\w*\s*[=:]\s*[\"']?[^\s\"'$]{8,}"),
}
EVERYWHERE = ("0.0.0.0/0", "::/0")
RENDER = "in cluster/site.toml, then `python -m cluster write`"

Complaints = Iterator[str]


def check(path: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with a layout, a line for each; empty where nothing is. `root` is where its file mounts lie."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        return [f"can't be read: {error}"]
    return list(dict.fromkeys([*_secrets(text), *(_script(text) if path.suffix == ".sh" else _document(text, root))]))


def _document(text: str, root: Path) -> Complaints:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield f"is no YAML: {error}"
        return
    if not isinstance(document, dict):
        yield f"must be a layout, rendered by `python -m cluster write`, got {str(document)[:60]!r}"
        return
    yield from _unset(document)
    yield from _open(document)
    yield from _kuberay(document) if "apiVersion" in document else _launched(document, root)


# What must hold of any text.


def _secrets(text: str) -> Complaints:
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in SECRETS.items():
            if pattern.search(line):
                yield f"line {number} holds {what}: keep it in a file in cluster/secrets, and out of {RENDER}"


def _unset(part: object, place: str = "") -> Complaints:
    if isinstance(part, Mapping):
        for name, value in part.items():
            yield from _unset(value, f"{place}.{name}".lstrip("."))
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from _unset(value, f"{place}[{number}]")
    elif unset(part):
        yield f"{place} is not set, {part!r}: set it {RENDER}"
    elif isinstance(part, str):
        for name, value in re.findall(rf'([\w-]+)="?({UNSET}[^"\n]*)', part):
            yield f"{name} is not set, {value!r}: set it {RENDER}"


def _open(part: object, place: str = "") -> Complaints:
    if isinstance(part, Mapping):
        for name, value in part.items():
            yield from _open(value, f"{place}.{name}".lstrip("."))
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from _open(value, f"{place}[{number}]")
    elif part in EVERYWHERE:
        yield f"{place} lets everyone in, {part!r}: name your own addresses, or a security group made for this"


def _misspelt(given: Collection[str], known: Collection[str], place: str, what: str = "name") -> Complaints:
    for name in given:
        if name not in known:
            near = did_you_mean(name, known)
            yield f"{place}: unknown {what} {name!r}{near or '; there are ' + ', '.join(sorted(known))}"


# Ray's launcher: AWS, GCP, machines reached by ssh.


def _launched(document: Mapping[str, Any], root: Path) -> Complaints:
    before = list(_schema(document))
    yield from before
    if before:
        return  # what follows takes the shape for granted
    try:
        validate_config(prepare_config(dict(document)))
    except (click.ClickException, jsonschema.ValidationError, AssertionError, ValueError, RuntimeError) as error:
        yield f"Ray refuses it: {getattr(error, 'message', None) or error}"
    kind = document["provider"]["type"]
    if kind not in names.PROVIDERS:
        near = did_you_mean(kind, names.PROVIDERS)
        yield f"provider.type must be one of {', '.join(names.PROVIDERS)}, got {kind!r}{near}"
        return
    yield from _misspelt(document["provider"], names.PROVIDERS[kind], "provider")
    for name, node_type in document.get("available_node_types", {}).items():
        place = f"available_node_types.{name}"
        yield from NODE_CONFIGS[kind](node_type["node_config"], f"{place}.node_config")
        if node_type.get("min_workers", 0) > node_type.get("max_workers", document["max_workers"]):
            yield f"{place}: min_workers must be at most max_workers, got {node_type}: set cluster.max_workers {RENDER}"
        is_head = name == document["head_node_type"]
        if is_head and (node_type["resources"].get("CPU") != 0 or _has_gpu(node_type)):
            yield f"{place}: the head must have no GPU and resources CPU: 0, so that no trial runs there"
        if is_head and "spot" in str(node_type["node_config"]).lower():
            yield f"{place}: the head must not be on spot: the study's driver runs there"
    yield from _docker(document.get("docker", {}))
    yield from _mounts(document.get("file_mounts", {}), root)
    yield from _commands(document)
    yield from _environment(_exports("\n".join(document.get("setup_commands", []))), VARIABLES)


@cache
def _ray_schema() -> Any:
    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def _schema(document: Mapping[str, Any]) -> Complaints:
    for error in jsonschema.Draft7Validator(_ray_schema()).iter_errors(document):
        place = ".".join(map(str, error.absolute_path)) or "the layout"
        if error.validator == "additionalProperties" and isinstance(error.instance, Mapping):
            yield from _misspelt(error.instance, error.schema.get("properties", {}), place)
        else:
            yield f"{place}: {error.message}"


def _has_gpu(node_type: Mapping[str, Any]) -> bool:
    kind = str(node_type["node_config"].get("InstanceType", node_type["node_config"].get("machineType", "")))
    with_gpus = re.compile(r"(?:g\d|p\d|gr\d)\w*\.|(?:a[234]|g[24])-")
    return bool(with_gpus.match(kind) or node_type["node_config"].get("guestAccelerators"))


def _aws(node: Mapping[str, Any], place: str) -> Complaints:
    try:
        from botocore.session import get_session
    except ModuleNotFoundError:
        yield f"{place} can't be checked, nor machines started, without boto3: pip install -e '.[cloud]'"
        return
    shape = _machine_of_aws(get_session())
    # Ray's own name for several subnets, of which it takes one.
    yield from _like_aws({name: value for name, value in node.items() if name != "SubnetIds"}, shape, place)
    if not node.get("SecurityGroupIds"):
        yield f"{place} must name SecurityGroupIds: the group that Ray makes by itself lets ssh in from everywhere"
    if not node.get("IamInstanceProfile"):
        yield f"{place} must name an IamInstanceProfile, so that no keys of AWS lie on machines: see cluster/README.md"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield f"{place}.MetadataOptions.HttpTokens must be 'required', so that no web request can be led to its keys"
    for disk in node.get("BlockDeviceMappings", []):
        if disk.get("Ebs", {}).get("Encrypted") is not True:
            yield f"{place}.BlockDeviceMappings: Ebs.Encrypted must be true, got {disk}"


@cache
def _machine_of_aws(session: Any) -> Any:
    return session.get_service_model("ec2").operation_model("RunInstances").input_shape


def _like_aws(given: Any, shape: Any, place: str) -> Complaints:
    wanted: Mapping[str, Any] = {
        "structure": Mapping,
        "list": list,
        "string": str,
        "integer": int,
        "boolean": bool,
    }
    kind = wanted.get(shape.type_name, object)
    if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
        yield f"{place} must be a {shape.type_name}, got {given!r}"
    elif shape.type_name == "structure":
        yield from _misspelt(given, shape.members, place)
        for name in given.keys() & shape.members:
            yield from _like_aws(given[name], shape.members[name], f"{place}.{name}")
    elif shape.type_name == "list":
        for number, each in enumerate(given):
            yield from _like_aws(each, shape.member, f"{place}[{number}]")
    elif shape.type_name == "string" and shape.enum and not unset(given) and shape.name != "InstanceType":
        yield from _misspelt([given], shape.enum, place, "value")


def _gcp(node: Mapping[str, Any], place: str) -> Complaints:
    try:
        import googleapiclient
    except ModuleNotFoundError:
        yield f"{place} can't be checked, nor machines started, without Google's client: pip install -e '.[cloud]'"
        return
    schemas = _schemas_of_gcp(Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json")
    # Ray's own name for a template to start from.
    given = {name: value for name, value in node.items() if name != "sourceInstanceTemplate"}
    yield from _like_gcp(given, {"$ref": "Instance"}, schemas, place)
    networks = node.get("networkInterfaces", [])
    if not networks or any(not each.get("subnetwork") or "default" in each["subnetwork"] for each in networks):
        yield f"{place}.networkInterfaces must name a subnetwork of yours: the default one lets ssh in from everywhere"


@cache
def _schemas_of_gcp(file: Path) -> Any:
    return json.loads(file.read_text())["schemas"]


def _like_gcp(given: Any, schema: Mapping[str, Any], schemas: Mapping[str, Any], place: str) -> Complaints:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    wanted: Mapping[str, Any] = {
        "object": Mapping,
        "array": list,
        "string": (str, int),
        "boolean": bool,
        "integer": int,
    }
    kind = wanted.get(schema["type"], object)
    if not isinstance(given, kind) or (isinstance(given, bool) and schema["type"] in ("integer", "string")):
        yield f"{place} must be {schema['type']}, got {given!r}"
    elif "properties" in schema:
        yield from _misspelt(given, schema["properties"], place)
        for name in given.keys() & schema["properties"]:
            yield from _like_gcp(given[name], schema["properties"][name], schemas, f"{place}.{name}")
    elif schema["type"] == "array":
        for number, each in enumerate(given):
            yield from _like_gcp(each, schema["items"], schemas, f"{place}[{number}]")
    elif "enum" in schema:
        yield from _misspelt([given], schema["enum"], place, "value")


NODE_CONFIGS: Mapping[str, Callable[[Mapping[str, Any], str], Complaints]] = {"aws": _aws, "gcp": _gcp}


def _docker(docker: Mapping[str, Any]) -> Complaints:
    given = [option for options in docker if options.endswith("run_options") for option in docker[options]]
    for option in given:
        if option.startswith("--"):
            yield from _misspelt([option[2:].partition("=")[0]], names.DOCKER_OPTIONS, "docker.run_options", "option")
    image = docker.get("image", "")
    if docker and not unset(image) and (":" not in image.rpartition("/")[2] or image.endswith(":latest")):
        yield f"docker.image must name one version, so that all nodes run the same, got {image!r}: set it {RENDER}"


def _mounts(mounts: Mapping[str, str], root: Path) -> Complaints:
    for there, here in mounts.items():
        if not (root / Path(here).expanduser()).exists():
            way = "make it by cluster/services/services.sh secrets" if "secrets" in here else "call it as it is"
            yield f"file_mounts.{there}: {here!r} not found in {root}: {way}"


def _commands(document: Mapping[str, Any]) -> Complaints:
    for section, commands in document.items():
        if not section.endswith("_commands"):
            continue
        for number, command in enumerate(commands):
            yield from _shell(command, f"{section}[{number}]")
            for words in _calls_of_ray(command):
                yield from _ray_call(words, f"{section}[{number}]")
    starts = [words for command in document["head_start_ray_commands"] for words in _calls_of_ray(command)]
    if not any(words[0] == "start" and _option(words, "dashboard-host") == "127.0.0.1" for words in starts):
        yield "head_start_ray_commands: `ray start` must say --dashboard-host=127.0.0.1; `ray dashboard` leads there"


def _shell(script: str, place: str) -> Complaints:
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if result.returncode != 0 or result.stderr:
        yield f"{place} is no shell script: {result.stderr.strip()}"


def _calls_of_ray(script: str) -> Iterator[Sequence[str]]:
    """What follows the word `ray` in each command of a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        for command in re.split(r"[;&|]+", line):
            if match := re.match(r"\s*ray (.*)", command):
                try:
                    yield shlex.split(match[1].replace("$(", "(")) or [""]
                except ValueError:
                    yield [""]


def _ray_call(words: Sequence[str], place: str) -> Complaints:
    yield from _misspelt(words[:1], ray_commands.commands, f"{place}: ray", "command")
    if (command := ray_commands.commands.get(words[0])) is not None:
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        given = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        yield from _misspelt(given, known, f"{place}: ray {words[0]}", "option")


def _option(words: Sequence[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), None)


def _exports(script: str) -> dict[str, str]:
    return dict(re.findall(r'^\s*export (\w+)="([^"]*)"', script, re.MULTILINE))


def _environment(variables: Mapping[str, str], needed: Collection[str]) -> Complaints:
    ours = [name for name in variables if name.startswith(("HDML_", "MLFLOW_"))]
    yield from _misspelt(ours, [*VARIABLES, *OPTIONAL], "the environment", "variable")
    for name in needed:
        if name not in variables:
            yield f"the environment lacks {name}: render the layout again by `python -m cluster write`"
    if "RAY_AUTH_MODE" in needed and variables.get("RAY_AUTH_MODE", "token") != "token":
        yield f"RAY_AUTH_MODE must be token, got {variables['RAY_AUTH_MODE']!r}: else any caller runs what he likes"
    of_ray = [name.removeprefix("RAY_") for name in variables if re.match(r"RAY_[a-z]", name)]
    known = dir(_raylet.Config)  # type: ignore[attr-defined]  # Ray's types don't tell of it
    yield from _misspelt(of_ray, known, "the environment", "setting of Ray, RAY_")


# KubeRay.


def _kuberay(document: Mapping[str, Any]) -> Complaints:
    if (kind := (document["apiVersion"], document.get("kind"))) != ("ray.io/v1", "RayJob"):
        yield f"apiVersion and kind must be ray.io/v1 and RayJob, got {kind}"
        return
    before = list(_like(document, names.RAYJOB, "the layout"))
    yield from before
    cluster = document.get("spec", {}).get("rayClusterSpec", {})
    head, workers = cluster.get("headGroupSpec", {}), cluster.get("workerGroupSpecs", [])
    if before or not (head and workers):
        return
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "spec.rayClusterSpec.authOptions.mode must be token: else whoever reaches Ray runs what he likes"
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "spec.rayClusterSpec.headGroupSpec must have serviceType ClusterIP and no ingress: Ray is for pods alone"
    for place, group in [
        ("headGroupSpec", head),
        *((f"workerGroupSpecs[{i}]", each) for i, each in enumerate(workers)),
    ]:
        place = f"spec.rayClusterSpec.{place}"
        start = ray_commands.commands["start"]
        known = [option[2:] for parameter in start.params for option in parameter.opts]
        yield from _misspelt(group.get("rayStartParams", {}), known, f"{place}.rayStartParams", "option of `ray start`")
        (container, *_) = group["template"]["spec"]["containers"]
        needed = [name for name in VARIABLES if not name.startswith("RAY_")]
        yield from _environment({each["name"]: each.get("value", "") for each in container.get("env", [])}, needed)
        gpus = container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0)
        if group is head and (gpus or group["rayStartParams"].get("num-cpus") != "0"):
            yield f"{place}: the head must have no GPU and rayStartParams num-cpus: '0', so that no trial runs there"
        if group is not head and not gpus:
            yield f"{place}: workers must ask for nvidia.com/gpu in resources.limits, got {container.get('resources')}"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 1):
            yield f"{place}: minReplicas must be at most maxReplicas: set cluster.max_workers {RENDER}"
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
        yield from _misspelt(mounted, volumes, f"{place}.volumeMounts", "volume")


def _like(given: Any, known: Any, place: str) -> Complaints:
    if isinstance(known, Mapping):
        if not isinstance(given, Mapping):
            yield f"{place} must be an object, got {given!r}"
            return
        yield from _misspelt(given, known, place)
        for name in given.keys() & known:
            yield from _like(given[name], known[name], name if place == "the layout" else f"{place}.{name}")
    elif isinstance(known, list):
        if not isinstance(given, list):
            yield f"{place} must be a list, got {given!r}"
            return
        for number, each in enumerate(given):
            yield from _like(each, known[0], f"{place}[{number}]")


# Slurm.


def _script(text: str) -> Complaints:
    yield from _unset(text)
    yield from _shell(text, "the script")
    directives = re.findall(r"^#SBATCH\s+(.*)$", text, re.MULTILINE)
    for directive in directives:
        if not directive.startswith("--"):
            yield f"#SBATCH {directive}: options must be written out, as --name=value"
            continue
        yield from _misspelt([directive[2:].partition("=")[0]], names.SBATCH_OPTIONS, "#SBATCH", "option")
    if "--requeue" not in directives:
        yield "#SBATCH --requeue lacks: a job that Slurm takes back would not go on by itself"
    for words in _calls_of_ray(re.sub(r"^\s+ray", "ray", text.replace("\\\n", " "), flags=re.MULTILINE)):
        yield from _ray_call(words, "the script")
    if "--dashboard-host=127.0.0.1" not in text:
        yield "the script: `ray start --head` must say --dashboard-host=127.0.0.1"
    yield from _environment(_exports(text), [name for name in VARIABLES if name != "RAY_ADDRESS"])
