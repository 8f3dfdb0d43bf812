"""A whole study's output is searched for the secrets that it was run with."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sqlalchemy

from tests.conftest import ROOT

pytestmark = pytest.mark.cluster

LEDGER, TRACKER, ENVIRONMENT = "ledger-p4ssword", "tracker-p4ssword", "environment-p4ssword"
TOKEN, PGPASS, CREDENTIALS = "0123456789abcdef" * 4, "pgpass-p4ssword", "credentials-p4ssword"
SECRETS = (LEDGER, TRACKER, ENVIRONMENT, TOKEN, PGPASS, CREDENTIALS)


@pytest.fixture
def home(tmp_path):
    """A home folder with the files that Ray, PostgreSQL and MLflow read."""
    files = {
        ".ray/auth_token": TOKEN,
        ".pgpass": f"*:*:*:other:{PGPASS}",
        ".mlflow/credentials": f"[mlflow]\nmlflow_tracking_password = {CREDENTIALS}",
    }
    for name, content in files.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o600)
    return tmp_path / "home"


def test_no_secret_is_in_anything_that_a_study_leaves(home, tmp_path, postgresql, mlflow_server):
    out = tmp_path / "out"
    # These servers ask for no password; an address may have one all the same.
    ledger = sqlalchemy.make_url(postgresql.url("secrets")).set(password=LEDGER)
    address = ledger.render_as_string(hide_password=False)
    # What a library says when it fails may hold the very address that it was given.
    says = "no answer from $HDML_LEDGER, $TOLD, $MLFLOW_TRACKING_PASSWORD"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray:
        environment = {
            **os.environ,
            "HOME": str(home),
            "RAY_TMPDIR": ray,
            "HDML_LEDGER": address,
            "MLFLOW_TRACKING_URI": mlflow_server.url.replace("//", f"//hdml:{TRACKER}@"),
            "MLFLOW_TRACKING_PASSWORD": ENVIRONMENT,
            "TOLD": CREDENTIALS,
        }

        def run(*arguments, **more):
            command = [sys.executable, "-m", *arguments]
            return subprocess.run(
                command, cwd=ROOT, env=environment | more, capture_output=True, text=True, check=False
            )

        settings = ["always_raises=1", f"says={json.dumps(says)}", "max_attempts=2"]
        toy = run("tests.machinery.toy_study", str(out), "3", *settings)
        assert toy.returncode == 0, toy.stderr
        wrong = {"HDML_LEDGER": address.replace("/secrets", "/elsewhere")}
        others = [
            run("studies", "show", "toy", "--out", str(out)),
            run("studies", "list", "--out", str(out)),
            run("studies", "show", "toy", "--out", str(out), **wrong),
        ]
        assert [done.returncode for done in others] == [0, 0, 2]
        of_ray = {name: text for name, text in files(Path(ray)).items() if not is_the_trials_own(name)}
    terminal = {f"terminal {n}": done.stdout + done.stderr for n, done in enumerate([toy, *others])}
    ledger_rows = {"the ledger": rows(postgresql.url("secrets"))}
    kept = {**terminal, **ledger_rows, **of_ray, **files(out), **files(mlflow_server.folder)}

    # The failure is told wherever it has to be, and what it says of secrets nowhere.
    assert "no answer from postgresql+psycopg://tests:***@" in kept["terminal 0"]
    assert "no answer from postgresql+psycopg://tests:***@" in kept["the ledger"]
    (attached,) = [text for name, text in kept.items() if name.endswith("logs/attempt-2.txt")]
    assert "no answer from postgresql+psycopg://tests:***@" in attached
    assert [(secret, name) for name, text in kept.items() for secret in SECRETS if secret in text] == []


def is_the_trials_own(name):
    """What a trial prints and raises goes to Ray's files on its node as it is; what is kept elsewhere is cleared."""
    return "/worker-" in name or "/error." in name


def files(folder):
    return {
        str(path): path.read_bytes().decode(errors="replace")
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def rows(url):
    """Everything in a database, as one text."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        return "\n".join(str(row) for table in tables.sorted_tables for row in connection.execute(table.select()))
