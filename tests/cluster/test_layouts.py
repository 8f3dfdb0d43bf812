"""Every layout: rendered from the site, clean once that is filled in, and no typo in any part of it goes unnoticed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray._common.utils import get_default_ray_temp_dir

from cluster import layouts, requirements, site
from cluster.__main__ import DONE, WRONG, main
from cluster.check import check
from tests.conftest import ROOT

FOLDER = ROOT / "cluster"
FILES = tuple(layouts.LAYOUTS)
LAUNCHED = ("gpu.yaml", "gcp.yaml", "local.yaml")


def filled() -> str:
    """The site file as a user leaves it: each value that is his to give is the example that it names."""
    return re.sub(r'"SET: [^"]*? such as ([^" ,]+)[^"]*"', r'"\1"', site.FILE.read_text())


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A folder with the layouts of a site that is filled in."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "site.toml").write_text(filled())
    assert main(["write", "--site", str(folder / "site.toml"), "--to", str(folder)]) == DONE
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project's folder, as far as layouts mount it."""
    folder = tmp_path_factory.mktemp("project")
    for name in (*layouts.SOURCE, "cluster/secrets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def spoilt(rendered, root, tmp_path):
    """Complaints about a layout in which one thing is replaced."""

    def complaints(file: str, old: str, new: str) -> list[str]:
        text = (rendered / file).read_text()
        assert old in text
        changed = tmp_path / file
        changed.write_text(text.replace(old, new, 1))
        return check(changed, root)

    return complaints


@pytest.mark.parametrize("file", FILES)
def test_what_is_published_is_what_the_published_site_renders(file):
    assert (FOLDER / file).read_text() == layouts.LAYOUTS[file](site.load()), "run `python -m cluster write`"


@pytest.mark.parametrize("file", FILES)
def test_a_published_layout_lacks_nothing_but_what_is_the_users_to_give(file, root):
    complaints = check(FOLDER / file, root)
    assert complaints
    assert [each for each in complaints if "is not set, " not in each] == []
    assert all("cluster/site.toml, then `python -m cluster write`" in each for each in complaints)


def test_each_value_that_is_the_users_to_give_is_told_by_the_layouts_that_use_it(root):
    values = re.findall(r'^[^#\n]*"(SET: [^"]*)"', site.FILE.read_text(), re.MULTILINE)
    told = [each for file in FILES for each in check(FOLDER / file, root)]
    assert [value for value in values if not any(repr(value)[1:-1] in each for each in told)] == []


@pytest.mark.parametrize("file", FILES)
def test_a_layout_that_is_filled_in_is_clean(file, rendered, root):
    assert check(rendered / file, root) == []


@pytest.mark.parametrize("file", FILES)
def test_each_layout_begins_with_what_it_is_and_how_it_is_used(file):
    head = (FOLDER / file).read_text().split("#SBATCH")[0].split("\n\n")[0]
    assert file in head
    assert "python -m cluster write" in head
    assert head.count("#   ") >= 4


TYPOS = [
    ("gpu.yaml", "cluster_name:", "cluster_nam:", "'cluster_nam'; did you mean 'cluster_name'"),
    ("gpu.yaml", "upscaling_speed:", "upscale_speed:", "did you mean 'upscaling_speed'"),
    ("gpu.yaml", "availability_zone:", "availability_zones:", "did you mean 'availability_zone'"),
    ("gpu.yaml", "type: aws", "type: asw", "got 'asw'; did you mean 'aws'"),
    ("gpu.yaml", "ssh_user:", "ssh_usr:", "did you mean 'ssh_user'"),
    ("gpu.yaml", "container_name:", "containername:", "did you mean 'container_name'"),
    ("gpu.yaml", "--shm-size", "--shm-sise", "docker.run_options: unknown option 'shm-sise'; did you mean 'shm-size'"),
    ("gpu.yaml", "head_node_type: head", "head_node_type: haed", "`head_node_type` must be one of"),
    ("gpu.yaml", "    max_workers: 4", "    max_worker: 4", "available_node_types.worker: unknown name 'max_worker'"),
    ("gpu.yaml", "CPU: 0", "CPU: none", "'none' is not of type"),
    ("gpu.yaml", "InstanceType:", "InstanceTyp:", "head.node_config: unknown name 'InstanceTyp'; did you mean"),
    ("gpu.yaml", "VolumeType:", "VolumneType:", "BlockDeviceMappings[0].Ebs: unknown name 'VolumneType'; did you mean"),
    ("gpu.yaml", "gp3", "gp33", "Ebs.VolumeType: unknown value 'gp33'; did you mean"),
    ("gpu.yaml", "VolumeSize: 200", "VolumeSize: '200'", "VolumeSize must be a integer, got '200'"),
    ("gpu.yaml", "MarketType: spot", "MarketTyp: spot", "worker.node_config.InstanceMarketOptions: unknown name"),
    ("gpu.yaml", "HttpTokens:", "HttpToken:", "MetadataOptions: unknown name 'HttpToken'; did you mean 'HttpTokens'"),
    ("gpu.yaml", "initialization_commands:", "init_commands:", "unknown name 'init_commands'"),
    ("gpu.yaml", "then sudo mount", "than sudo mount", "initialization_commands[0] is no shell script"),
    ("gpu.yaml", "hdml_core: hdml_core", "hdml_core: hdml_cor", "file_mounts.~/hdml/hdml_core: 'hdml_cor' not found"),
    ("gpu.yaml", "HDML_LEDGER", "HDML_LEGDER", "'HDML_LEGDER'; did you mean 'HDML_LEDGER'"),
    ("gpu.yaml", "HDML_LEDGER", "HDML_LEGDER", "the environment lacks HDML_LEDGER"),
    ("gpu.yaml", "RAY_health_check_period_ms", "RAY_health_check_periode_ms", "did you mean 'health_check_period_ms'"),
    ("gpu.yaml", "ray start --head", "ray strat --head", "unknown command 'strat'; did you mean 'start'"),
    ("gpu.yaml", "--autoscaling-config", "--autoscale-config", "head_start_ray_commands[1]: ray start: unknown option"),
    ("gpu.yaml", "--address=$RAY", "--adress=$RAY", "'--adress'; did you mean '--address'"),
    ("gcp.yaml", "project_id:", "projectid:", "did you mean 'project_id'"),
    (
        "gcp.yaml",
        "machineType:",
        "machinetype:",
        "head.node_config: unknown name 'machinetype'; did you mean 'machineType'",
    ),
    ("gcp.yaml", "sourceImage:", "sourceimage:", "disks[0].initializeParams: unknown name 'sourceimage'; did you mean"),
    ("gcp.yaml", "provisioningModel: SPOT", "provisioningModel: SPOTT", "unknown value 'SPOTT'; did you mean 'SPOT'"),
    ("gcp.yaml", "scheduling:", "schedulling:", "did you mean 'scheduling'"),
    ("gcp.yaml", "subnetwork:", "subnet:", "networkInterfaces[0]: unknown name 'subnet'"),
    ("gcp.yaml", "    resources:\n      CPU: 16", "    resource:\n      CPU: 16", "did you mean 'resources'"),
    ("local.yaml", "head_ip:", "head_ips:", "head_ip"),
    ("local.yaml", "worker_ips:", "workers_ips:", "worker_ips"),
    ("local.yaml", "ssh_private_key:", "ssh_privat_key:", "did you mean 'ssh_private_key'"),
    ("local.yaml", "setup_commands:", "setup_command:", "did you mean 'setup_commands'"),
    ("local.yaml", "rsync_exclude:", "rsync_excludes:", "did you mean 'rsync_exclude'"),
    ("local.yaml", "  END\n", "", "setup_commands[0] is no shell script"),
    ("kuberay.yaml", "entrypoint:", "entrypint:", "spec: unknown name 'entrypint'; did you mean 'entrypoint'"),
    ("kuberay.yaml", "kind: RayJob", "kind: RayJobb", "must be ray.io/v1 and RayJob"),
    ("kuberay.yaml", "rayVersion:", "rayversion:", "rayClusterSpec: unknown name 'rayversion'; did you mean"),
    ("kuberay.yaml", "maxReplicas:", "maxReplica:", "workerGroupSpecs[0]: unknown name 'maxReplica'; did you mean"),
    (
        "kuberay.yaml",
        "dashboard-host:",
        "dashbord-host:",
        "rayStartParams: unknown option of `ray start` 'dashbord-host'",
    ),
    (
        "kuberay.yaml",
        "securityContext:",
        "securitycontext:",
        "template.spec: unknown name 'securitycontext'; did you mean",
    ),
    ("kuberay.yaml", "mountPath:", "mountpath:", "volumeMounts[0]: unknown name 'mountpath'; did you mean 'mountPath'"),
    ("kuberay.yaml", "postStart:", "poststart:", "lifecycle: unknown name 'poststart'; did you mean 'postStart'"),
    ("kuberay.yaml", "claimName:", "claim:", "volumes[1].persistentVolumeClaim: unknown name 'claim'; did you mean"),
    (
        "kuberay.yaml",
        "- name: data\n              mountPath",
        "- name: dta\n              mountPath",
        "unknown volume 'dta'",
    ),
    ("kuberay.yaml", "- name: HDML_OUT", "- name: HDML_UOT", "did you mean 'HDML_OUT'"),
    ("slurm.sh", "--partition=", "--partitoin=", "#SBATCH: unknown option 'partitoin'; did you mean 'partition'"),
    ("slurm.sh", "HDML_DATA=", "HDML_DTAA=", "did you mean 'HDML_DATA'"),
    ("slurm.sh", "--node-ip-address", "--node-ip-adress", "'--node-ip-adress'; did you mean '--node-ip-address'"),
    ("slurm.sh", "sleep 2; done", "sleep 2", "the script is no shell script"),
]


@pytest.mark.parametrize(("file", "old", "new", "complaint"), TYPOS)
def test_a_typo_is_told_with_its_place_and_the_way_out(spoilt, file, old, new, complaint):
    complaints = spoilt(file, old, new)
    assert any(complaint in each for each in complaints), complaints


HAZARDS = [
    (
        "gpu.yaml",
        "      SecurityGroupIds:\n      - sg-0123456789abcdef0\n",
        "",
        "must name SecurityGroupIds: the group that Ray",
    ),
    (
        "gpu.yaml",
        "  cache_stopped_nodes: true",
        "  security_group: {IpPermissions: [{FromPort: 22, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}",
        "provider.security_group.IpPermissions[0].IpRanges[0].CidrIp lets everyone in",
    ),
    ("gpu.yaml", "HttpTokens: required", "HttpTokens: optional", "HttpTokens must be 'required'"),
    ("gpu.yaml", "Encrypted: true", "Encrypted: false", "Ebs.Encrypted must be true"),
    (
        "gpu.yaml",
        "      IamInstanceProfile:\n        Arn: arn:aws:iam::123456789012:instance-profile/hdml-head\n",
        "",
        "IamInstanceProfile",
    ),
    (
        "gpu.yaml",
        "InstanceType: m7i.xlarge",
        "InstanceType: g6.xlarge",
        "available_node_types.head: the head must have no GPU",
    ),
    ("gpu.yaml", "CPU: 0", "CPU: 4", "available_node_types.head: the head must have no GPU and resources CPU: 0"),
    (
        "gpu.yaml",
        "InstanceType: m7i.xlarge",
        "InstanceType: m7i.xlarge\n      InstanceMarketOptions: {MarketType: spot}",
        "spot",
    ),
    (
        "gpu.yaml",
        "    min_workers: 0\n    max_workers: 4",
        "    min_workers: 4\n    max_workers: 2",
        "at most max_workers",
    ),
    ("gpu.yaml", "ray:2.60.0-py311-gpu", "ray:latest", "docker.image must name one version"),
    ("gpu.yaml", 'RAY_AUTH_MODE="token"', 'RAY_AUTH_MODE="disabled"', "RAY_AUTH_MODE must be token, got 'disabled'"),
    ("gpu.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "must say --dashboard-host=127.0.0.1"),
    ("gpu.yaml", "hdml@10.0.0.5", "hdml:geheim@10.0.0.5", "holds a password in an address"),
    ("gpu.yaml", "cluster_name: hdml", "cluster_name: AKIA" + "IOSFODNN7EXAMPLE", "holds an access key of AWS"),
    ("gpu.yaml", 'RAY_ADDRESS="auto"', 'RAY_AUTH_TOKEN="' + 32 * "7" + '"', "holds a token"),
    ("gcp.yaml", "subnetworks/hdml", "subnetworks/default", "must name a subnetwork of yours"),
    ("gcp.yaml", "machineType: n2-standard-4", "machineType: g2-standard-4", "the head must have no GPU"),
    ("kuberay.yaml", "mode: token", "mode: disabled", "authOptions.mode must be token"),
    ("kuberay.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer", "Ray is for pods alone"),
    ("kuberay.yaml", "num-cpus: '0'", "num-cpus: '4'", "headGroupSpec: the head must have no GPU"),
    ("kuberay.yaml", "minReplicas: 4", "minReplicas: 9", "minReplicas must be at most maxReplicas"),
    (
        "kuberay.yaml",
        "nvidia.com/gpu: 1\n            volumeMounts",
        "pods: 1\n            volumeMounts",
        "must ask for nvidia.com",
    ),
    ("slurm.sh", "#SBATCH --requeue\n", "", "--requeue lacks"),
    ("slurm.sh", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "must say --dashboard-host=127.0.0.1"),
]


@pytest.mark.parametrize(("file", "old", "new", "complaint"), HAZARDS)
def test_what_is_open_dear_or_secret_is_told(spoilt, file, old, new, complaint):
    complaints = spoilt(file, old, new)
    assert any(complaint in each for each in complaints), complaints


def test_a_file_that_is_no_layout_is_told(tmp_path):
    assert check(tmp_path / "none.yaml")[0].startswith("can't be read")
    (tmp_path / "list.yaml").write_text("[1]")
    assert check(tmp_path / "list.yaml") == ["must be a layout, rendered by `python -m cluster write`, got '[1]'"]
    (tmp_path / "torn.yaml").write_text("a: [")
    assert check(tmp_path / "torn.yaml")[0].startswith("is no YAML")


def test_the_command_tells_each_file_and_ends_with_status_3_where_anything_is_wrong(rendered, capsys):
    assert main(["check", str(rendered / "kuberay.yaml"), str(rendered / "slurm.sh")]) == DONE
    assert capsys.readouterr().out.count("nothing to complain of") == 2
    assert main(["check", str(rendered / "slurm.sh"), str(FOLDER / "slurm.sh")]) == WRONG
    assert "PATH is not set" in capsys.readouterr().out


def test_ssh_on_the_loopback_makes_a_layout_that_is_clean_and_a_check_leaves_nothing_behind(tmp_path, root):
    text = re.sub(r"^head = .*$", 'head = "127.0.0.1"', filled(), flags=re.MULTILINE)
    text = re.sub(r"^workers = .*$", "workers = []", text, flags=re.MULTILINE)
    text = text.replace('name = "hdml"', 'name = "looked-at-only"')
    text = text.replace('proxy_command = ""', 'proxy_command = "nc 127.0.0.1 2222"')
    text = text.replace('python = ""', f'python = "{Path(sys.executable).parent}"')
    (tmp_path / "site.toml").write_text(text)
    assert main(["write", "--site", str(tmp_path / "site.toml"), "--to", str(tmp_path)]) == DONE
    assert check(tmp_path / "local.yaml", root) == []
    layout = yaml.safe_load((tmp_path / "local.yaml").read_text())
    assert layout["auth"]["ssh_proxy_command"] == "nc 127.0.0.1 2222"
    assert not list(Path(get_default_ray_temp_dir()).glob("cluster-looked-at-only*"))


@pytest.mark.parametrize("file", LAUNCHED)
def test_what_is_mounted_is_there_and_no_folder_that_grows_is_among_it(file):
    mounts = yaml.safe_load((FOLDER / file).read_text())["file_mounts"]
    assert set(mounts.values()) == {*layouts.SOURCE, "cluster/secrets"}
    assert not {".", ".venv", "runs", "data"} & set(mounts.values())
    assert all((ROOT / name).exists() for name in layouts.SOURCE)


def test_a_lost_node_is_noticed_after_the_time_that_the_site_says():
    settings = {name.removeprefix("RAY_health_check_"): int(value) for name, value in layouts.health(30.0).items()}
    each = settings["period_ms"] + settings["timeout_ms"]
    assert settings["failure_threshold"] * each == pytest.approx(30_000, abs=10)


# What a node does with itself.


def bash(script: str, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", script, *arguments],
        env={"HOME": str(home), "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SECRETS = {"ray_auth_token": ".ray/auth_token", "pgpass": ".pgpass", "mlflow_credentials": ".mlflow/credentials"}


@pytest.fixture
def home(tmp_path):
    """A node's home folder, as Ray's launcher has filled it: a program with its .git, secrets, an environment."""
    home = tmp_path / "home"
    project, secrets = home / "hdml", home / ".hdml_secrets"
    (project / "cluster").mkdir(parents=True)
    secrets.mkdir()
    for name in ("cluster/node.sh", "cluster/requirements.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    (project / "README.md").write_text("here")
    git = ["git", "-C", str(project), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], check=True)
    (project / "README.md").unlink()
    for name in SECRETS:
        (secrets / name).write_text(f"the {name}\n")
    lines = [f'export PATH="{Path(sys.executable).parent}:$PATH"', f'export HDML_DATA="{home}/data"']
    (home / ".hdml_environment").write_text("\n".join([*lines, f'export HDML_OUT="{home}/runs"', ""]))
    return home


def test_a_node_is_made_ready_and_again_and_only_the_head_keeps_what_opens_the_services(home):
    script = str(home / "hdml/cluster/node.sh")
    for _ in range(2):
        result = bash(script, home)
        assert result.returncode == 0, result.stderr
    for name, place in SECRETS.items():
        assert (home / place).read_text() == f"the {name}\n"
        assert (home / place).stat().st_mode & 0o777 == 0o600
    assert (home / ".bashrc").read_text().count(".hdml_environment") == 1
    assert (home / ".profile").read_text().count(".hdml_environment") == 1
    assert (home / "hdml/README.md").read_text() == "here"
    assert (home / "data").is_dir()
    assert (home / "runs").is_dir()
    python = subprocess.run(
        ["bash", "--login", "-c", "-i", "source ~/.bashrc; command -v python"],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert python.stdout.strip() == str(Path(sys.executable).with_name("python"))
    (home / ".hdml_head").touch()
    assert bash(script, home, "worker").returncode == 0
    assert (home / ".pgpass").exists(), "a home folder that is the head's as well"
    (home / ".hdml_head").unlink()
    assert bash(script, home, "worker").returncode == 0
    assert (home / ".ray/auth_token").exists()
    left = [name for name in ("pgpass", "mlflow_credentials") if (home / ".hdml_secrets" / name).exists()]
    assert (left, (home / ".pgpass").exists(), (home / ".mlflow/credentials").exists()) == ([], False, False)


def test_a_node_that_knows_no_such_command_says_what_there_are(home):
    result = bash(str(home / "hdml/cluster/node.sh"), home, "wroker")
    assert (result.returncode, result.stderr) == (2, "usage: bash cluster/node.sh [secrets|worker]\n")


def test_a_python_that_lacks_a_version_is_told_apart(tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    assert requirements.missing(tmp_path) == []
    pins = tmp_path / "constraints.txt"
    pins.write_text(re.sub(r"^optuna==.*$", "optuna==0.1", pins.read_text(), flags=re.MULTILINE))
    (lacking,) = requirements.missing(tmp_path)
    assert re.fullmatch(r"optuna: 0\.1 wanted, \S+ there", lacking)


# Slurm: its own part is played; everything else is the script's.

PLAYED = {
    "ray": 'echo "ray $*" >> calls; case "$1" in start) exec sleep 60 ;; esac',
    "srun": 'echo "srun $*" >> calls; exec sleep 60',
    "scontrol": 'echo "scontrol $*" >> calls',
    "python": "echo \"python $*\" >> calls; trap 'exit 130' TERM; for _ in $(seq 200); do sleep 0.1; done",
}


@pytest.mark.parametrize("end", ["time is up", "done"])
def test_a_job_of_slurm_starts_all_nodes_and_is_queued_again_when_its_time_is_up(rendered, tmp_path, end):
    project = tmp_path / "project"
    (project / "cluster/secrets").mkdir(parents=True)
    (project / "bin").mkdir()
    shutil.copy(FOLDER / "node.sh", project / "cluster")
    (project / "cluster/secrets/ray_auth_token").write_text("token")
    for name, body in PLAYED.items():
        played = body if end == "time is up" or name != "python" else 'echo "python $*" >> calls'
        (project / "bin" / name).write_text(f"#!/usr/bin/env bash\n{played}\n")
        (project / "bin" / name).chmod(0o755)
    text = (rendered / "slurm.sh").read_text()
    script = project / "slurm.sh"
    script.write_text(re.sub(r'export PATH="[^"]*"', f'export PATH="{project}/bin:$PATH"', text))
    slurm = {"SUBMIT_DIR": str(project), "JOB_ID": "12345", "CPUS_PER_TASK": "8", "JOB_NUM_NODES": "3"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURMD_NODENAME": "node1"}
    process = subprocess.Popen(
        ["bash", str(script), "studies/alpha_beta.py", "--trials", "40"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    calls = project / "calls"
    deadline = time.monotonic() + 30
    while not (calls.exists() and "python" in calls.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if end == "time is up":
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if end == "time is up" else 0), errors
    said = calls.read_text()
    assert re.search(r"ray start --head .*--port=22345 --dashboard-host=127\.0\.0\.1", said)
    assert re.search(r"srun --nodes=2 --ntasks=2 --exclude=node1 --cpus-per-task=8 ray start --address=\S+:22345", said)
    assert "python studies/alpha_beta.py --trials 40" in said
    assert ("scontrol requeue 12345" in said) == (end == "time is up")
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_a_job_of_slurm_without_a_study_says_how_it_is_called():
    result = subprocess.run(["bash", str(FOLDER / "slurm.sh")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "usage: sbatch cluster/slurm.sh studies/NAME.py [OPTION ...]\n")


# The image, which takes a docker daemon to build.


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines]


def test_the_image_is_pinned_takes_what_is_there_and_runs_as_no_root():
    steps = instructions()
    assert {name for name, _ in steps} <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "LABEL", "CMD"}
    (base,) = [what for name, what in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.1[12]-slim-\w+", base)
    assert [what for name, what in steps if name == "USER"][-1] == "ray"
    (install,) = [what for name, what in steps if "uv pip install" in what]
    assert "--constraint constraints.txt --requirement /tmp/wanted" in install
    assert "--compile-bytecode" in install
    assert f"HOME={layouts.HOME}" in " ".join(what for name, what in steps if name == "ENV"), (
        "Ray's launcher asks for it"
    )
    tools = {"git", "rsync", "tmux", "openssh-client", "sudo"}
    assert tools <= set(" ".join(what for name, what in steps if name == "RUN").split())
    for what in (what for name, what in steps if name == "COPY"):
        sources = [word for word in what.split() if not word.startswith("--")][:-1]
        assert all((ROOT / source).exists() for source in sources), what
    assert "://" not in (FOLDER / "Dockerfile").read_text()
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert {".venv", "runs", "data", "cluster/secrets"} <= set(ignored)


def test_what_the_image_installs_is_what_studies_need_each_with_its_version():
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements.needed()}
    assert {"torch", "ray", "optuna", "mlflow", "boto3"} <= names <= pinned
