"""The services as a user starts them: secrets, a start from nothing, refusals, backup, restore, upgrade."""

import os
import re
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import mlflow
import psycopg
import pytest
import yaml
from mlflow.exceptions import MlflowException

from studies.machinery.storage import LedgerError, open_storage
from tests.conftest import ROOT
from tests.services import free_port

pytestmark = pytest.mark.cluster

FOLDER = ROOT / "cluster/services"
SECRET = re.compile(r"[0-9a-f]{64}")


class Services:
    """`services.sh` in a folder of its own, called by a user who is not root."""

    def __init__(self, folder: Path) -> None:
        if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
            pytest.skip("PostgreSQL not found: put its initdb on PATH")
        self.folder, self.secrets, self.place = folder, folder / "secrets", folder / "place"
        self.said = ""
        self.commands, self._known = set(), set()
        self.ports = {"HDML_POSTGRES_PORT": str(free_port()), "HDML_MLFLOW_PORT": str(free_port())}
        self.url = f"http://127.0.0.1:{self.ports['HDML_MLFLOW_PORT']}"
        self.ledger = f"postgresql+psycopg://hdml@127.0.0.1:{self.ports['HDML_POSTGRES_PORT']}/ledger"
        # Whoever he is, he may read this Python, even where it lies in root's home.
        self._user = []
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
            caps = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
            self._user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *caps]

    def call(self, *arguments, **environment):
        """Run a command; return its exit status and what it said."""
        with self.begin(*arguments, **environment) as process, _watching(self.commands):
            said = process.communicate()[0]
        self.said += said
        return process.returncode, said

    def begin(self, *arguments, **environment):
        """Start a command."""
        places = {"HDML_SECRETS": str(self.secrets), "HDML_SERVICES": str(self.place), "HOME": str(self.folder)}
        return subprocess.Popen(
            [*self._user, "bash", str(FOLDER / "services.sh"), *map(str, arguments)],
            env={**os.environ, **places, **self.ports, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def do(self, *arguments, **environment):
        """Run a command that has to succeed; return what it said."""
        status, said = self.call(*arguments, **environment)
        assert status == 0, said
        return said

    def known(self):
        """Every secret that there is, or was when this was asked before."""
        files = [path for path in self.secrets.rglob("*") if path.is_file()]
        self._known |= {secret for path in files for secret in SECRET.findall(path.read_text())}
        return self._known


def _running():
    """The command line of each process that there is."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            yield path.read_bytes().decode(errors="replace")


@contextmanager
def _watching(commands):
    """See what a command starts, short as it may live: about as `ps` would if it were called without end."""
    over = threading.Event()

    def watch():
        while not over.wait(0.005):
            commands.update(_running())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def short():
    """A folder with a path that a socket's may begin with, and that others than root may pass through."""
    folder = Path("/tmp") / f"hdml-services-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def services(short):
    (short / "one").mkdir()
    its = Services(short / "one")
    its.do("secrets")
    its.do("start")
    yield its
    its.do("stop")


@pytest.fixture
def client(services, monkeypatch, tmp_path):
    """A client of the tracker that has its credentials from the file alone."""
    (tmp_path / ".mlflow").mkdir()
    shutil.copy(services.secrets / "mlflow_credentials", tmp_path / ".mlflow/credentials")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return mlflow.MlflowClient(services.url)


def test_secrets_are_made_once_and_for_their_owner_alone(services):
    files = {path: path.read_text() for path in services.secrets.rglob("*") if path.is_file()}
    assert {path.name for path in services.secrets.iterdir()} == {
        *("ray_auth_token", "pgpass", "mlflow_credentials", "server")
    }
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert services.secrets.stat().st_mode & 0o777 == 0o700
    assert services.do("secrets").count("there already") == len(files)
    assert files == {path: path.read_text() for path in files}
    # Each for one purpose, the role's alone in two forms.
    assert len(services.known()) == len(files) - 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0"),
        ("POST", "/ajax-api/2.0/mlflow/runs/search"),
        ("POST", "/graphql"),
        ("POST", "/v1/traces"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/planted"),
        ("GET", "/get-artifact?run_id=0&path=planted"),
        ("POST", "/api/2.0/mlflow/users/create"),
    ],
)
@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic aGRtbDp3cm9uZw=="}])
def test_mlflow_serves_no_stranger(services, method, path, header):
    content = None if method == "GET" else b"{}"
    with pytest.raises(HTTPError, match="401"):
        urlopen(Request(services.url + path, content, {"Content-Type": "application/json", **header}, method=method))
    assert not list(services.place.glob("artifacts/**/planted"))


def test_mlflow_answers_to_no_other_name(services):
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(services.url + "/api/2.0/mlflow/experiments/get", headers={"Host": "rebound.example.com"}))


def test_mlflow_serves_who_has_the_credentials_files_included(client, services, monkeypatch):
    run = client.create_run(client.create_experiment("served")).info.run_id
    client.log_text(run, "kept", "notes/one.txt")
    assert Path(client.download_artifacts(run, "notes/one.txt")).read_text() == "kept"
    assert list(services.place.glob("artifacts/**/notes/one.txt"))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "hdml")
    with pytest.raises(MlflowException, match="401"):
        client.get_run(run)


def test_postgresql_serves_who_has_the_password_and_no_one_else(services, monkeypatch):
    monkeypatch.setenv("PGPASSFILE", "/dev/null")
    with pytest.raises(LedgerError, match="no password supplied"):
        open_storage(services.ledger)
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(LedgerError, match="password authentication failed"):
        open_storage(services.ledger)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(services.secrets / "pgpass"))
    storage = open_storage(services.ledger)
    # And can do no more with it than keep a ledger.
    with (
        psycopg.connect(services.ledger.replace("+psycopg", "")) as connection,
        pytest.raises(psycopg.Error, match="must be superuser"),
    ):
        connection.execute("COPY (SELECT 1) TO PROGRAM 'id'")
    storage.engine.dispose()


def test_all_comes_back_from_a_backup_and_nothing_is_overwritten(services, client, short, monkeypatch):
    monkeypatch.setenv("PGPASSFILE", str(services.secrets / "pgpass"))
    storage = open_storage(services.ledger)
    study = storage.create_new_study([1], "kept")
    storage.create_new_trial(study)
    storage.engine.dispose()
    run = client.create_run(client.create_experiment("kept")).info.run_id
    client.log_text(run, "kept", "one.txt")
    said = services.do("backup", short / "one/backup")
    status, refused = services.call("backup", short / "one/backup")
    assert (status, "must be empty" in refused) == (2, True)
    assert not [secret for secret in services.known() if secret in said]

    (short / "two").mkdir()
    other = Services(short / "two")
    try:
        assert f"{other.place}/postgresql.part" in other.do("restore", short / "one/backup")
        status, refused = other.call("restore", short / "one/backup")
        assert (status, "must be empty, has" in refused) == (2, True)
        other.do("start")
        storage = open_storage(other.ledger)
        assert [len(storage.get_all_trials(s._study_id)) for s in storage.get_all_studies()] == [1]
        storage.engine.dispose()
        assert mlflow.MlflowClient(other.url).get_run(run).info.run_id == run
        restored = mlflow.MlflowClient(other.url)
        assert Path(restored.download_artifacts(run, "one.txt")).read_text() == "kept"
    finally:
        other.do("stop")
    (other.secrets / "pgpass").write_text("*:*:*:hdml:another")
    status, refused = other.call("restore", short / "one/backup")
    assert (status, "holds other secrets than the backup" in refused) == (2, True)


def test_an_upgrade_begins_with_a_backup_may_be_repeated_and_keeps_everything(services, client):
    run = client.create_run(client.create_experiment("upgraded")).info.run_id
    for count in (1, 2):
        said = services.do("upgrade")
        assert said.index("pg_dump") < said.index("mlflow db upgrade") < said.index("optuna storage upgrade")
        assert len(list(services.place.glob("backups/*/mlflow.dump"))) == count
    assert client.get_run(run).info.run_id == run


def test_a_stop_and_a_start_keep_everything_and_nothing_runs_in_between(services, client):
    run = client.create_run(client.create_experiment("stopped")).info.run_id
    services.do("stop")
    status, said = services.call("status")
    assert (status, said.count("does not answer")) == (3, 2)
    assert not [command for command in _running() if str(services.place) in command]
    services.do("start")
    assert services.do("start").count(" answers at ") == 2
    assert client.get_run(run).info.run_id == run


def test_mistakes_are_told_with_the_way_out(services):
    wrong = [
        (["strat"], {}, "usage: "),
        (["backup"], {}, "backup DIR"),
        (["restore", "/nowhere"], {}, "/nowhere is no backup: mlflow.dump not found"),
        (["start"], {"HDML_SECRETS": "/nowhere"}, "/nowhere/pgpass not found: run"),
    ]
    for arguments, environment, complaint in wrong:
        status, said = services.call(*arguments, **environment)
        assert (status, complaint in said) == (2, True), said


@pytest.mark.parametrize("command", [["start"], ["restore", "/nowhere"]])
def test_root_is_sent_away(command):
    if os.geteuid() != 0:
        pytest.skip("only root can see whether root is sent away")
    done = subprocess.run(["bash", FOLDER / "services.sh", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, "the user who is to own the services" in done.stderr) == (2, True)


def test_a_start_that_was_killed_is_begun_again_by_the_next(short, monkeypatch):
    (short / "killed").mkdir()
    its = Services(short / "killed")
    its.do("secrets")
    try:
        for moment in ("initdb", "pg_ctl start", "psql", "setsid"):
            with its.begin("start") as process:
                assert any(f"$ {moment}" in line for line in process.stdout)
                os.killpg(process.pid, signal.SIGKILL)
        its.do("start")
        monkeypatch.setenv("PGPASSFILE", str(its.secrets / "pgpass"))
        open_storage(its.ledger).engine.dispose()
    finally:
        its.do("stop")


def test_a_new_password_counts_from_the_next_start(services, monkeypatch, tmp_path):
    old = services.secrets / "pgpass"
    shutil.copy(old, tmp_path / "old")
    assert len(services.known()) == 5
    for name in ("pgpass", "server/hdml_password"):
        path = services.secrets / name
        path.write_text(SECRET.sub("5" * 64, path.read_text()))
    services.do("start")
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "old"))
    with pytest.raises(LedgerError, match="password authentication failed"):
        open_storage(services.ledger)
    monkeypatch.setenv("PGPASSFILE", str(old))
    open_storage(services.ledger).engine.dispose()


def test_no_secret_was_on_a_command_line_or_is_in_a_log(services):
    programs = ("initdb", "psql", "pg_dump", "mlflow server", "mlflow db", "optuna storage")
    seen = [command.replace("\0", " ") for command in services.commands]
    assert [program for program in programs if not any(program in command for command in seen)] == []
    logs = [path.read_text() for path in services.place.glob("*.log")]
    assert len(logs) == 3
    assert not [secret for secret in services.known() for text in [*seen, *logs, services.said] if secret in text]


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_containers_are_pinned_reachable_from_here_alone_and_hold_no_password(compose, services):
    for name, service in compose["services"].items():
        assert re.search(r":[\w.${}-]*\d", service["image"]), name
        assert ":latest" not in service["image"]
        assert service["restart"] == "unless-stopped"
        assert "healthcheck" in service
        assert all(port.startswith("${HDML_SERVICES_HOST:-127.0.0.1}:") for port in service.get("ports", []))
        variables = service.get("environment", {})
        assert not [key for key in variables if "PASSWORD" in key and not key.endswith("_FILE")]


def test_containers_find_the_secrets_that_are_made(compose, services):
    for secret in compose["secrets"].values():
        assert (services.secrets / Path(secret["file"]).relative_to("../secrets")).is_file()
    named = {name for service in compose["services"].values() for name in service.get("secrets", [])}
    assert named == compose["secrets"].keys()
    assert compose["services"]["mlflow"]["command"][-1] == "serve"
    for mount in compose["services"]["postgres"]["volumes"][1:]:
        assert (FOLDER / mount.split(":")[0]).is_file()


def test_the_container_of_the_database_hands_over_what_its_user_may_not_read(compose, short):
    if os.geteuid() != 0:
        pytest.skip("only root can hand a file over")
    there = short / "container"
    for folder in ("run/secrets", "run/hdml"):
        (there / folder).mkdir(parents=True)
    (there / "run/secrets/hdml_password").write_text("kept")
    (there / "run/secrets/hdml_password").chmod(0o600)
    shell, option, script = compose["services"]["postgres"]["entrypoint"]
    read = f"setpriv --reuid=postgres --regid=postgres --clear-groups cat {there}/run/hdml/hdml_password"
    script = script.replace("/run/", f"{there}/run/").replace("docker-entrypoint.sh postgres", read)
    assert compose["services"]["postgres"]["environment"]["PASSWORD_FILE"] == "/run/hdml/hdml_password"
    done = subprocess.run([shell, option, script], capture_output=True, text=True, check=True)
    assert done.stdout == "kept"
