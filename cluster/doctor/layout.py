"""What can be known before a cluster is started: the layout, the secrets, the tools, and who may come in."""

import ipaddress
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from cluster.check import check
from cluster.doctor.finding import BAD, Finding, Findings, bad, first_line, ok, unseen
from cluster.site import unset

SECRETS = Path(__file__).parents[1] / "secrets"
MAKE_SECRETS = "cluster/services/services.sh secrets"
SHAPES = {
    "ray_auth_token": (re.compile(r"\S{16,}\s*"), "one word of 16 letters or more"),
    "pgpass": (re.compile(r"(?:(?:[^:\n]+:){4}[^\n]+\n?)+"), "lines of HOST:PORT:DATABASE:USER:PASSWORD"),
    "mlflow_credentials": (
        re.compile(r"\[mlflow\]\s+mlflow_tracking_username\s*=\s*\S+\s+mlflow_tracking_password\s*=\s*\S+\s*"),
        "[mlflow] with mlflow_tracking_username and mlflow_tracking_password",
    ),
}
PLACEHOLDER = re.compile(r"SET:|change.?me|<\w[^>]*>|password\s*=\s*password\b|:password$|\bx{4,}\b", re.I | re.M)
LAUNCHERS = {"aws": ("boto3",), "gcp": ("googleapiclient", "google.oauth2"), "local": ()}
"""What Ray's launcher imports, by provider."""
SSH = 22


def examine(path: Path) -> Findings:
    """Look at a layout and at what it takes to start it."""
    complaints = check(path)
    yield from (Finding(BAD, f"{path}: {complaint}") for complaint in complaints)  # each names its way out
    if not complaints:
        yield ok(f"{path}: nothing to complain of")
    yield from secrets(SECRETS)
    document = yaml.safe_load(path.read_text()) if path.suffix != ".sh" else {}
    document = document if isinstance(document, dict) else {}
    yield from tools(path, document)
    yield from doors(document)


def secrets(folder: Path) -> Findings:
    """Whether the secrets are there, no one else's to read, and real."""
    if not folder.is_dir():
        yield bad(f"{folder} not found, where the secrets are", MAKE_SECRETS)
        return
    sound = 0
    for name, (shape, wanted) in SHAPES.items():
        path = folder / name
        try:
            text, mode = path.read_text(), path.stat().st_mode & 0o777
        except OSError as error:
            yield bad(f"secret {path} can't be read, {error.strerror}", MAKE_SECRETS)
            continue
        if mode & 0o077:
            yield bad(f"secret {path} must be its owner's alone (mode 600), got {mode:o}", f"chmod 600 {path}")
        elif not text.strip():
            yield bad(f"secret {path} is empty", f"rm {path} && {MAKE_SECRETS}")
        elif PLACEHOLDER.search(text):
            yield bad(f"secret {path} is a placeholder", f"rm {path} && {MAKE_SECRETS}")
        elif not shape.fullmatch(text):
            yield bad(f"secret {path} must be {wanted}, got something else", f"rm {path} && {MAKE_SECRETS}")
        else:
            sound += 1
    if sound == len(SHAPES):
        yield ok(f"secrets in {folder}: {', '.join(SHAPES)}, their owner's alone")


def tools(path: Path, document: Mapping[str, Any]) -> Findings:
    """Whether this machine has what starts such a cluster."""
    if "provider" not in document:
        tool = "sbatch" if path.suffix == ".sh" else "kubectl"
        found = shutil.which(tool)
        yield ok(f"{tool} at {found}") if found else unseen(f"whether {path} can be started from here", f"no {tool}")
        return
    missing = [tool for tool in ("ssh", "rsync") if shutil.which(tool) is None]
    yield from (bad(f"{tool} not found, which `ray up` calls", f"install the package {tool}") for tool in missing)
    modules = LAUNCHERS.get(document["provider"].get("type"), ())
    absent = [name for name in modules if _lacks(name)]
    if absent:
        yield bad(f"Python lacks {', '.join(absent)}, which `ray up` imports", "pip install -e '.[cloud]'")
    if not missing and not absent:
        yield ok(f"what `ray up` calls and imports: {', '.join(('ssh', 'rsync', *modules))}")


def _lacks(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:
        return True


def doors(document: Mapping[str, Any]) -> Findings:
    """Who may come in, as the cloud has it just now."""
    provider = document.get("provider", {})
    match provider.get("type"):
        case "aws":
            groups = sorted({group for node in _nodes(document) for group in node.get("SecurityGroupIds", [])})
            set_groups = [group for group in groups if not unset(group)]
            if set_groups:
                yield from security_groups(str(provider.get("region")), set_groups)
            else:
                yield unseen("who may come in", "no security group is named yet")
        case "gcp":
            yield unseen(
                "who may come in",
                "the network's firewall says it: gcloud compute firewall-rules list --filter=direction=INGRESS",
            )
        case _:
            yield unseen("who may come in", "the firewall of these machines is not the layout's: see cluster/README.md")


def _nodes(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for kind in document.get("available_node_types", {}).values():
        yield kind.get("node_config", {})


def security_groups(region: str, names: Sequence[str]) -> Findings:
    """Ask AWS what its security groups let in."""
    by_hand = f"aws ec2 describe-security-groups --region {region} --group-ids {' '.join(names)}"
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ModuleNotFoundError:
        yield unseen("who may come in", f"no boto3 here to ask AWS with; {by_hand}")
        return
    try:
        patience = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1})
        client = boto3.client("ec2", region_name=region, config=patience)
        groups = client.describe_security_groups(GroupIds=list(names))["SecurityGroups"]
    except (BotoCoreError, ClientError) as error:
        yield unseen("who may come in", f"AWS does not tell: {first_line(error)}; {by_hand}")
        return
    for group in groups:
        yield from security_group(group)


def security_group(group: Mapping[str, Any]) -> Findings:
    """Whether a security group, as AWS describes it, lets in ssh from few, and all from its own nodes."""
    name = group["GroupId"]
    inside, found = False, list[Finding]()
    ssh: list[str] = []
    for rule in group["IpPermissions"]:
        everything = rule["IpProtocol"] == "-1"
        inside |= everything and name in [pair["GroupId"] for pair in rule.get("UserIdGroupPairs", [])]
        ranges = [each["CidrIp"] for each in rule.get("IpRanges", [])]
        ranges += [each["CidrIpv6"] for each in rule.get("Ipv6Ranges", [])]
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        way_out = f"aws ec2 revoke-security-group-ingress --group-id {name} --security-group-rule-ids ..."
        for cidr in ranges:
            network = ipaddress.ip_network(cidr)
            if network.prefixlen == 0:
                found.append(bad(f"security group {name} lets everyone in, {cidr}", way_out))
            elif ports == (SSH, SSH):
                ssh.append(cidr)
            elif not network.is_private:
                what = "all ports" if everything else f"ports {ports[0]} to {ports[1]}"
                found.append(
                    bad(f"security group {name} opens {what} to {cidr}, and ssh is all that is needed", way_out)
                )
    if not inside:
        way_out = f"aws ec2 authorize-security-group-ingress --group-id {name} --protocol all --source-group {name}"
        found.append(bad(f"security group {name} keeps its own nodes from one another", way_out))
    yield from found
    if not found:
        yield ok(f"security group {name}: ssh from {', '.join(ssh) or 'nowhere'}, all else among its nodes alone")
