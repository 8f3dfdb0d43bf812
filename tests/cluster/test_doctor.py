"""The doctor: what it makes of what it is told, and a real cluster that is well, then ill in one way after another."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
import psutil
import pytest

from cluster.doctor import DONE, MISTAKE, WRONG, _say, judge, layout, main, node, services
from cluster.doctor.finding import bad, ok, unseen
from studies.machinery.storage import open_storage
from tests.cluster.test_services import Services
from tests.conftest import ROOT
from tests.services import free_port

HERE = judge.Here({"python": "3.11.7", "optuna": "5.0.0"}, "a" * 64, "0123abc", "", True)
WRITTEN = {"speed": 410.0, "small": 3.0}


def card(driver="580.1", free=22_000.0, users=(), name="L4", index=0):
    return {"index": index, "name": name, "driver": driver, "total": 23_034.0, "free": free, "users": list(users)}


def gpus(counted=1.0, cards=None, usable=None, error="", hidden=False):
    cards = [card()] if cards is None else cards
    usable = [["L4", "8.9"]] if usable is None else usable
    return {"counted": counted, "cards": cards, "usable": usable, "error": error, "hidden": hidden}


def listening(*programs, public=()):
    return {"listening": [(program, "10.0.0.5", port) for program, port in programs], "public": list(public)}


GCS = ("gcs_server", 6379)
VERSIONS = dict(HERE.versions)

# Which look, what two nodes said, and lines of which each must be there, as it begins; BAD ones name the way out.
JUDGED = [
    ("versions", VERSIONS, VERSIONS, ["ok  versions on 2 nodes: python 3.11.7, optuna 5.0.0"]),
    ("versions", VERSIONS, VERSIONS | {"optuna": "4.9.0"}, ["BAD two has optuna 4.9.0, the driver 5.0.0: bring it to"]),
    ("versions", VERSIONS, VERSIONS | {"optuna": node.ABSENT}, ["BAD two has optuna none, the driver 5.0.0"]),
    ("source", "a" * 64, "a" * 64, ["ok  program on 2 nodes: digest aaaaaaaaaaaa, commit 0123abc"]),
    ("source", "a" * 64, "b" * 64, ["BAD two has another program, bbbbbbbbbbbb, the driver aaaaaaaaaaaa: `ray up`"]),
    ("source", "a" * 64, "", ["BAD two has no program: set PYTHONPATH"]),
    ("gpus", gpus(0, [], []), gpus(0, [], []), ["ok  no GPU on 2 nodes: trials train on CPUs"]),
    ("gpus", gpus(), gpus(), ["ok  GPUs: 2 x L4, each 21 GB free of 22 GB", "ok  NVIDIA driver 580.1 on all nodes"]),
    ("gpus", gpus(), gpus(2.0), ["BAD Ray counts 2 GPUs on two, torch uses 1: start Ray there with --num-gpus=1"]),
    ("gpus", gpus(), gpus(0.0), ["BAD Ray counts 0 GPUs on two, torch uses 1: start Ray there with --num-gpus=1"]),
    ("gpus", gpus(), gpus(usable=[], error="RuntimeError: too old"), ["BAD torch can't use the GPUs of two, Runtime"]),
    ("gpus", gpus(), gpus(cards=[card(), card()]), ["BAD two has 2 GPUs, torch uses 1: see `nvidia-smi"]),
    ("gpus", gpus(), gpus(cards=[card(), card()], hidden=True), ["ok  GPUs: 3 x L4"]),
    ("gpus", gpus(), gpus(cards=[]), ["--  driver and memory of the GPUs of two: no nvidia-smi"]),
    ("gpus", gpus(), gpus(cards=[card("570.0")]), ["BAD NVIDIA drivers differ, 570.0 on two; 580.1 on one: install"]),
    ("gpus", gpus(), gpus(usable=[["A100", "8.0"]]), ["ok  GPUs of unlike kinds, so trials differ in speed and in"]),
    ("gpus", gpus(), gpus(cards=[card(users=["process 7 900 MB"])]), ["ok  GPU 0 of two is in use: process 7 900 MB"]),
    (
        "data",
        {"folder": "/data", "free": 90e9, **WRITTEN},
        {"folder": "/data", "free": 30e9, **WRITTEN},
        ["ok  HDML_DATA /data on 2 nodes: 30 to 90 GB free, written at 410 MB/s, a small file in 3 ms"],
    ),
    (
        "data",
        {"folder": "/data", "free": 1e9, **WRITTEN},
        {"folder": "/data", "error": "Read-only file system"},
        ["BAD HDML_DATA /data has 1.0 GB free on one: free", "BAD HDML_DATA /data can't be written on two, Read-only"],
    ),
    ("out", {"seen": True, **WRITTEN}, {"seen": True, **WRITTEN}, ["ok  HDML_OUT on 2 nodes: written at 410 MB/s"]),
    ("out", {"seen": True, **WRITTEN}, {"seen": False}, ["ok  HDML_OUT is not seen on two: checkpoints travel"]),
    ("out", {"seen": True, **WRITTEN}, {"seen": True, "error": "full"}, ["BAD HDML_OUT is seen and can't be written"]),
    ("archives", {"address": ""}, {"address": ""}, ["ok  HDML_ARCHIVES is not set"]),
    ("archives", {"address": ""}, {"address": "/x", "entries": 2}, ["BAD HDML_ARCHIVES names /x on two, nothing for"]),
    ("manifests", {}, {}, ["ok  no data set is decoded yet"]),
    ("manifests", {"cub200": ["c" * 64]}, {}, ["ok  cub200 decoded on 1 node: digest cccccccccccc"]),
    ("manifests", {"sop": ["c" * 64]}, {"sop": ["d" * 64]}, ["BAD sop is not the same data on all nodes, cccccc"]),
    ("ports", listening(), listening(), ["ok  Ray listens on the loopback alone"]),
    ("ports", listening(GCS), listening(GCS), ["ok  Ray listens to its network on 2 nodes, none with a public"]),
    ("ports", listening(GCS, ("dashboard", 8265)), listening(), ["BAD the dashboard of one listens beyond the loopb"]),
    ("ports", listening(GCS, public=["8.8.8.8"]), listening(), ["--  whether a firewall keeps strangers from one at"]),
    ("files", 65_536, 1_048_576, ["ok  open files: 65536 or more on 2 nodes"]),
    ("files", 65_536, 1_024, ["BAD open files on two are limited to 1024: `ulimit -n 65536`"]),
    ("memory", {"shared": 4e9, "store": 2e9}, {"shared": 4e9, "store": 2e9}, ["ok  object store of 2000 MB in /dev"]),
    ("memory", {"shared": 4e9, "store": 2e9}, {"shared": 64e6, "store": 2e9}, ["BAD /dev/shm of two has 0.1 GB, less"]),
    ("clocks", (0.001, 0.001), (-0.5, 0.004), ["ok  clocks of 2 nodes agree within 504 ms"]),
    ("clocks", (0.0, 0.001), (-9.5, 0.004), ["BAD the clock of two is 9.5 s behind: sudo apt-get install -y chrony"]),
    ("clocks", (3.0, 2.0), (0.0, 0.0), ["ok  clocks of 2 nodes agree within 5000 ms"]),
]  # fmt: skip


@pytest.mark.parametrize(("look", "one", "two", "lines"), JUDGED)
def test_each_look_is_judged(look, one, two, lines):
    said = [str(line) for line in judge.judge({look: {"one": one, "two": two}}, {}, HERE)]
    for line in lines:
        assert [each for each in said if each.startswith(line)], said
    assert any(line.startswith("BAD") for line in said) == any(line.startswith("BAD") for line in lines)
    assert all(": " in line for line in said if line.startswith("BAD"))


def test_archives_must_be_those_of_the_driver():
    here = HERE._replace(archives="s3://ours")
    said = {
        "archives": {"one": {"address": "s3://ours", "entries": 4}, "two": {"address": "s3://ours", "error": "403"}}
    }
    assert [str(line).split(":")[0] for line in judge.judge(said, {}, here)] == [
        "BAD HDML_ARCHIVES s3",
        "ok  HDML_ARCHIVES s3",
    ]
    (line,) = judge.judge({"archives": {"one": {"address": ""}}}, {}, here)
    assert str(line).startswith("BAD HDML_ARCHIVES names nothing on one, s3://ours for the driver: `ray up` again")


def test_open_ray_at_a_public_address_is_bad():
    (line,) = judge.judge({"ports": {"one": listening(GCS, public=["8.8.8.8"])}}, {}, HERE._replace(token=False))
    assert str(line).startswith("BAD one is at 8.8.8.8 with Ray open to anyone, gcs_server 6379: close all ports")


def test_a_look_that_failed_is_told_and_bad_where_studies_hang_on_it():
    failed = {"gpus": {"one": "nvidia-smi: broken"}, "out": {"two": "no answer within 30 s"}}
    assert [str(line) for line in judge.judge({}, failed, HERE)] == [
        "--  gpus of one: nvidia-smi: broken",
        "BAD out of two, no answer within 30 s: mount the storage of HDML_OUT anew, or set it elsewhere",
    ]


def test_what_hangs_keeps_nobody_from_telling_the_rest(monkeypatch, tmp_path):
    released = node.threading.Event()
    monkeypatch.setattr(node, "LIMIT", 0.2)
    monkeypatch.setattr(node, "ports", released.wait)
    monkeypatch.setattr(node, "versions", lambda: 1 / 0)
    (tmp_path / "mark").touch()
    found, failed = node.look(node.Asked(tmp_path, tmp_path, "mark", 0, 1e9))
    released.set()
    assert failed["ports"] == "no answer within 0 s"
    assert failed["versions"] == "division by zero"
    assert found["manifests"] == {}
    assert found["memory"]["store"] == 1e9


def test_a_node_tells_of_its_folders(tmp_path):
    (tmp_path / "mark").touch()
    assert node.data(tmp_path)["speed"] > 0
    assert node.data(tmp_path / "mark/data")["error"] == "Not a directory"
    assert node.out(tmp_path, "mark").keys() == {"seen", "speed", "small"}
    assert node.out(tmp_path, "other") == node.out(None, "mark") == {"seen": False}
    (tmp_path / "cache").mkdir()
    for key, digest in (("123", "c" * 64), ("456", "c" * 64), ("789", "d" * 64)):
        (tmp_path / f"cache/cub200-{key}.json").write_text(json.dumps({"digest": digest}))
    assert node.manifests(tmp_path) == {"cub200": ["c" * 64, "d" * 64]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "mark"]


def test_a_node_tells_of_its_archives(monkeypatch, tmp_path):
    assert node.archives() == {"address": ""}
    for address, entries in ((str(tmp_path), 2), (f"file://{tmp_path}", 2)):
        monkeypatch.setenv("HDML_ARCHIVES", address)
        for name in ("a.zip", "b.zip"):
            (tmp_path / name).touch()
        assert node.archives() == {"address": address, "entries": entries}
    monkeypatch.setenv("HDML_ARCHIVES", "nowhere://bucket")
    assert "nowhere" in node.archives()["error"]


def test_a_node_tells_of_its_gpus(monkeypatch, tmp_path):
    """The driver's own program, in place of which this one answers as it does."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*compute-apps*) echo 'GPU-1, 4242, 900' ;;\n"
        "*) echo '0, GPU-0, NVIDIA L4, 580.1, 23034, 22000'; echo '1, GPU-1, NVIDIA L4, 580.1, 23034, 100' ;;\n"
        "esac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(node, "USES_GPUS", 'print(\'[["NVIDIA L4", "8.9"], ["NVIDIA L4", "8.9"]]\')')
    own = node.gpus(2.0)
    assert [each["users"] for each in own["cards"]] == [[], ["process 4242 900 MB"]]
    assert own["cards"][1] | {"users": []} == card(free=100.0, name="NVIDIA L4", index=1)
    assert own["usable"] == [["NVIDIA L4", "8.9"]] * 2
    monkeypatch.setattr(node, "USES_GPUS", "raise RuntimeError('the driver is too old')")
    assert node.gpus(2.0)["error"] == "RuntimeError: the driver is too old"
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    with pytest.raises(OSError, match="Failed to initialize NVML"):
        node.gpus(2.0)


@pytest.fixture
def secrets(tmp_path):
    """A folder of secrets as they should be."""
    files = {
        "ray_auth_token": "0123456789abcdef" * 4 + "\n",
        "pgpass": "*:*:*:hdml:0123456789abcdef\n",
        "mlflow_credentials": "[mlflow]\nmlflow_tracking_username = hdml\nmlflow_tracking_password = 0123456789\n",
    }
    for name, text in files.items():
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_secrets_are_looked_at(secrets):
    (line,) = layout.secrets(secrets)
    assert str(line).startswith("ok  secrets in ")
    (line,) = layout.secrets(secrets / "elsewhere")
    assert str(line).endswith("elsewhere not found, where the secrets are: cluster/services/services.sh secrets")


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("ray_auth_token", "", "is empty"),
        ("ray_auth_token", "SET: a token", "is a placeholder"),
        ("ray_auth_token", "short", "must be one word of 16 letters or more"),
        ("pgpass", "*:*:*:hdml:<password of the database>", "is a placeholder"),
        ("pgpass", "hdml 0123456789abcdef", "must be lines of HOST:PORT:DATABASE:USER:PASSWORD"),
        ("mlflow_credentials", "[mlflow]\nmlflow_tracking_password = changeme\n", "is a placeholder"),
        ("mlflow_credentials", "hdml:0123456789abcdef", "must be [mlflow] with mlflow_tracking_username"),
        ("pgpass", None, "can't be read, No such file or directory"),
    ],
)
def test_a_secret_that_is_none_is_bad(secrets, name, text, wrong):
    (secrets / name).unlink() if text is None else (secrets / name).write_text(text)
    (line,) = layout.secrets(secrets)
    assert str(line).startswith(f"BAD secret {secrets / name} {wrong}")
    assert "services.sh secrets" in line.text
    assert not text or text not in line.text


def test_a_secret_that_others_may_read_is_bad(secrets):
    (secrets / "pgpass").chmod(0o640)
    (line,) = layout.secrets(secrets)
    assert str(line) == (
        f"BAD secret {secrets}/pgpass must be its owner's alone (mode 600), got 640: chmod 600 {secrets}/pgpass"
    )


def rule(protocol="tcp", ports=(22, 22), cidr=None, group=None):
    own = {"IpProtocol": protocol, "IpRanges": [{"CidrIp": cidr}] if cidr else [], "Ipv6Ranges": []}
    own |= {"UserIdGroupPairs": [{"GroupId": group}] if group else []}
    return own | ({"FromPort": ports[0], "ToPort": ports[1]} if ports else {})


INSIDE = rule("-1", None, group="sg-1")


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ([INSIDE, rule(cidr="203.0.113.7/32")], "ok  security group sg-1: ssh from 203.0.113.7/32, all else among its"),
        ([INSIDE, rule(cidr="0.0.0.0/0")], "BAD security group sg-1 lets everyone in, 0.0.0.0/0: aws ec2 revoke-"),
        (
            [INSIDE, rule("-1", None, cidr="8.8.0.0/16")],
            "BAD security group sg-1 opens all ports to 8.8.0.0/16, and ssh",
        ),
        (
            [INSIDE, rule(ports=(8265, 8265), cidr="8.8.8.8/32")],
            "BAD security group sg-1 opens ports 8265 to 8265 to 8",
        ),
        ([rule(cidr="203.0.113.7/32")], "BAD security group sg-1 keeps its own nodes from one another: aws ec2 author"),
    ],
)
def test_a_security_group_is_judged(rules, line):
    (said,) = layout.security_group({"GroupId": "sg-1", "IpPermissions": rules})
    assert str(said).startswith(line)


def test_what_can_not_be_asked_is_told(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    document = {
        "provider": {"type": "aws", "region": "us-west-2"},
        "available_node_types": {"head": {"node_config": {"SecurityGroupIds": ["sg-1"]}}},
    }
    for each in (document, {"provider": {"type": "gcp"}}, {"provider": {"type": "local"}}, {}):
        (line,) = layout.doors(each)
        assert str(line).startswith("--  who may come in: ")
    (line,) = layout.doors(document)
    assert "aws ec2 describe-security-groups --region us-west-2 --group-ids sg-1" in line.text


def test_tools_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = [str(line) for line in layout.tools(Path("local.yaml"), {"provider": {"type": "local"}})]
    assert said == [
        f"BAD {tool} not found, which `ray up` calls: install the package {tool}" for tool in ("ssh", "rsync")
    ]
    for file in ("slurm.sh", "kuberay.yaml"):
        (line,) = layout.tools(Path(file), {})
        assert str(line).startswith(f"--  whether {file} can be started from here: no ")
    for tool in ("ssh", "rsync"):
        (tmp_path / tool).touch(mode=0o755)
    (line,) = layout.tools(Path("local.yaml"), {"provider": {"type": "local"}})
    assert str(line) == "ok  what `ray up` calls and imports: ssh, rsync"


def test_a_layout_is_looked_at_without_a_cluster(capsys, monkeypatch, secrets):
    monkeypatch.setattr(layout, "SECRETS", secrets)
    assert main([str(ROOT / "cluster/gpu.yaml")]) == WRONG
    said = capsys.readouterr().out
    assert "BAD " + str(ROOT / "cluster/gpu.yaml") + ": HDML_LEDGER is not set" in said
    assert f"\nok  secrets in {secrets}" in said
    assert "\n--  nodes, ledger and MLflow: RAY_ADDRESS is not set here; once the cluster runs: ray exec " in said


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [([], "RAY_ADDRESS must name a cluster where no layout is given"), (["nowhere.yaml"], "FILE must be a layout")],
)
def test_a_mistake_in_the_call_is_one_line(capsys, arguments, rule):
    assert main(arguments) == MISTAKE
    assert capsys.readouterr().err.startswith(f"error: {rule}")


def test_the_status_follows_from_what_is_bad(capsys, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "p4ssword-of-the-ledger")
    assert _say(iter([ok("a"), unseen("b", "c")])) == DONE
    assert _say(iter([ok("a"), bad("b has p4ssword-of-the-ledger", "c"), unseen("d", "e")])) == WRONG
    assert capsys.readouterr().out.splitlines() == [
        *("ok  a", "--  b: c", "1 ok, 0 BAD, 1 not looked at: nothing to mend"),
        *("ok  a", "BAD b has ***: c", "--  d: e"),
        "1 ok, 1 BAD, 1 not looked at: mend what is BAD before a study is begun",
    ]


def test_a_ledger_is_left_as_it_was(tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    for _ in range(2):
        (line,) = services.ledger(url)
        assert str(line).startswith("ok  ledger sqlite:///")
        assert open_storage(url).get_all_studies() == []


def test_a_ledger_of_another_optuna_is_bad(tmp_path):
    open_storage(f"sqlite:///{tmp_path}/ledger.db").engine.dispose()
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    connection.close()
    (line,) = services.ledger(f"sqlite:///{tmp_path}/ledger.db")
    assert str(line).startswith("BAD ")
    assert str(line).endswith("cluster/services/services.sh upgrade")


def test_a_tracker_is_left_as_it_was(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        (line,) = services.tracker(uri)
        assert str(line).startswith("ok  MLflow ")
        assert [each.name for each in mlflow.MlflowClient(uri).search_experiments()] == ["Default"]


@pytest.mark.cluster
def test_services_that_are_open_to_anyone_are_bad(postgresql, mlflow_server):
    *_, line = services.ledger(postgresql.url("doctor"))
    assert "lets in by any password: say scram-sha-256" in str(line)
    first, *_ = services.tracker(mlflow_server.url)
    assert str(first).startswith(
        f"BAD MLflow at {mlflow_server.url} answers anyone: start it with --app-name basic-auth"
    )


# A cluster as a user starts it, and the services beside it.


@pytest.fixture(scope="module")
def folder():
    """A short path, as sockets want it, which others than root may pass through."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.fixture(scope="module")
def real(folder):
    """The environment of a head: services with passwords, and a home that has what opens them."""
    (folder / "services").mkdir()
    its = Services(folder / "services")
    its.do("secrets")
    its.do("start")
    home = folder / "home"
    places = {"ray_auth_token": ".ray/auth_token", "pgpass": ".pgpass", "mlflow_credentials": ".mlflow/credentials"}
    for name, place in places.items():
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(its.secrets / name, home / place)
        (home / place).chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield kept | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "HDML_DATA": str(folder / "data"),
        "HDML_OUT": str(folder / "out"),
        "HDML_LEDGER": its.ledger,
        "MLFLOW_TRACKING_URI": its.url,
    }
    its.do("stop")


@contextmanager
def node_of_ray(folder, environment, *options, mounts=""):
    """A node, by `ray start`, its disks set apart by mounts; its processes, and no others, end with it."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats", "--block"]
    own_disks = ["unshare", "--mount"] if mounts else []
    script = f'{mounts}\nulimit -n "$(ulimit -Hn)"; exec "$@"'
    log = folder / f"ray-{len(list(folder.glob('ray-*.log')))}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*own_disks, "bash", "-ec", script, "-", *start, "--object-store-memory=80000000", *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        own = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(60)
        for each in psutil.wait_procs(own, timeout=10)[1]:
            each.kill()


@contextmanager
def head(folder, environment):
    """A head and its dashboard; the address."""
    port = free_port()
    ports = [f"--port={port}", f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    place = ["--head", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}/ray"]
    with node_of_ray(folder, environment, *place, *ports):
        yield f"127.0.0.1:{port}"


CASES = """
import io, json, os, signal, sys
from contextlib import redirect_stdout
from cluster.doctor import live, main, node
clock = node.clock
said = {}
for name, environment in json.loads(sys.argv[1]).items():
    before = dict(os.environ)
    os.environ.update(environment)
    node.clock = (lambda: clock() - 5) if "clock" in name else clock
    if "SILENCED" in environment:
        live.PATIENCE = 3
        os.kill(int(environment["SILENCED"]), signal.SIGSTOP)
    with redirect_stdout(io.StringIO()) as output:
        status = main([])
    said[name] = [status, output.getvalue().splitlines()]
    os.environ.clear()
    os.environ.update(before)
print(json.dumps(said))
"""


def examined(environment, cases):
    """What the doctor says, case by case, in one process: to start it takes longer than to run it."""
    command = [sys.executable, "-c", CASES, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ILL = {
    "no MLflow": ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "BAD MLflow at http://127.0.0.1:9 does not answer, "),
    "no ledger": (
        {"HDML_LEDGER": "postgresql+psycopg://hdml@127.0.0.1:9/ledger"},
        "BAD the ledger postgresql+psycopg://hdml@127.0.0.1:9/ledger can't be opened: ",
    ),
    "no output": (
        {"HDML_OUT": "/dev/null/out"},
        "BAD the output folder /dev/null/out can't be written: Not a directory: ",
    ),
    "a clock that is late": ({}, "BAD the clock of "),
    "no cluster": (
        {"RAY_ADDRESS": "127.0.0.1:9"},
        "BAD no Ray at 127.0.0.1:9, [Errno 111] Connection refused: `ray up`",
    ),
}


@pytest.fixture(scope="module")
def said(folder, real):
    """What the doctor says of a cluster that is well, and of the same with one thing wrong."""
    with head(folder, real) as address:
        cases = {"well": {}} | {name: environment for name, (environment, _) in ILL.items()}
        return examined(real | {"RAY_ADDRESS": address}, cases)


@pytest.mark.cluster
def test_a_cluster_that_is_well(said):
    status, lines = said["well"]
    assert status == DONE, lines
    assert not [line for line in lines if line.startswith("BAD")]
    for start in [
        "Ray 2",
        "Ray refuses who has no token",
        "the dashboard at 127.0.0.1:",
        "versions on 1 node: python 3",
        "program on 1 node: digest ",
        "HDML_DATA ",
        "HDML_OUT on 1 node: written at ",
        "clocks of 1 node agree within ",
        "ledger postgresql+psycopg://hdml@127.0.0.1:",
        "the ledger refuses a wrong password",
        "MLflow refuses who has no password (401)",
        "MLflow 3",
    ]:
        assert [line for line in lines if line.startswith(f"ok  {start}")], (start, lines)
    assert lines[-1].endswith("nothing to mend")


@pytest.mark.cluster
@pytest.mark.parametrize("case", ILL)
def test_a_cluster_that_is_ill_in_one_way(said, case):
    status, lines = said[case]
    assert status == WRONG
    (line,) = [line for line in lines if line.startswith("BAD")]
    assert line.startswith(ILL[case][1])


@pytest.mark.cluster
@pytest.mark.skipif(
    os.geteuid() != 0 or any(name != "lo" for name in psutil.net_if_addrs()),
    reason="an open Ray is started in an empty network alone, and a node with disks of its own by root",
)
def test_an_open_cluster_with_a_node_unlike_the_others(folder, real, said):
    """`said` for its cluster to have ended."""
    other = folder / "other"
    shutil.copytree(ROOT / "studies", other / "studies", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "studies/machinery/records.py").write_text('"""As it was a while ago."""')
    (other / "optuna-4.9.0.dist-info").mkdir()
    (other / "optuna-4.9.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: optuna\nVersion: 4.9.0\n")
    mounts = f"mount --bind {other}/studies {ROOT}/studies; mount -t tmpfs tmpfs {folder}/out"
    open_to_all = real | {"RAY_AUTH_MODE": "disabled"}
    unlike = open_to_all | {"PYTHONPATH": f"{other}:{ROOT}", "HDML_ARCHIVES": "/nowhere"}
    with ExitStack() as stack:
        address = stack.enter_context(head(folder, open_to_all))
        second = stack.enter_context(node_of_ray(folder, unlike, f"--address={address}", mounts=mounts))
        (raylet,) = [each for each in second.children(recursive=True) if each.name() == "raylet"]
        stack.callback(raylet.resume)
        cases = {"open": {}, "silent": {"SILENCED": str(raylet.pid)}}
        told = examined(open_to_all | {"RAY_ADDRESS": address}, cases)
    status, lines = told["open"]
    assert status == WRONG
    for part in [
        "BAD Ray lets anyone who reaches it run anything: start Ray with RAY_AUTH_MODE=token",
        " takes jobs from anyone: start Ray with RAY_AUTH_MODE=token",
        ") has optuna 4.9.0, the driver 5.0.0: bring it to constraints.txt",
        ") has another program, ",
        "BAD HDML_ARCHIVES names /nowhere on ",
        "ok  HDML_OUT on 1 node: written at ",
        "ok  HDML_OUT is not seen on ",
    ]:
        assert len([line for line in lines if part in line]) == 1, (part, lines)
    status, lines = told["silent"]
    assert status == WRONG
    assert len([line for line in lines if ") does not answer within 3 s: see `ray status -v`" in line]) == 1, lines
    assert [line for line in lines if line.startswith("ok  versions on 1 node: ")]
