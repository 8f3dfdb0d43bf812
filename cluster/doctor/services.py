"""The ledger's database and MLflow, as a driver here would use them."""

import os
import time
from collections.abc import Callable
from http import HTTPStatus
from urllib.error import HTTPError
from urllib.request import urlopen

import mlflow
from mlflow.entities import Metric, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests.exceptions import RequestException
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from cluster.doctor.finding import Finding, Findings, bad, first_line, ok, unseen
from studies.machinery.experiment import HABITS
from studies.machinery.ledger import Ledger
from studies.machinery.storage import LedgerError, Storage, open_storage

NAME = "hdml.doctor"
"""What the study and the experiment are called that are made to be deleted again."""
TIMES = 5
"""Writes of which the mean is told."""
POINTS = 10
START, UPGRADE = "cluster/services/services.sh start", "cluster/services/services.sh upgrade"


def ledger(url: str) -> Findings:
    """Whether the ledger opens, has the schema of this Optuna, refuses strangers, and how fast it is."""
    place = make_url(url).render_as_string(hide_password=True)
    try:
        storage = open_storage(url)
    except LedgerError as error:
        # Optuna's word for tables of another version of it is RuntimeError.
        start = f"{START}, or set HDML_LEDGER; its password is in ~/.pgpass (mode 600)"
        yield bad(str(error), UPGRADE if isinstance(error.__cause__, RuntimeError) else start)
        return
    try:
        has, wanted = storage.get_current_version(), storage.get_head_version()
        if has != wanted:
            yield bad(f"the ledger {place} has schema {has}, this Optuna {wanted}", UPGRADE)
        else:
            yield ok(f"ledger {place}: schema {has}, a commit in {_commit(storage):.1f} ms")
    except (SQLAlchemyError, LedgerError) as error:
        yield bad(f"the ledger {place} can't be written, {first_line(error)}", "see the database's log")
    finally:
        storage.engine.dispose()
    if make_url(url).get_backend_name() == "postgresql":
        yield _strangers(url, place)


def _commit(storage: Storage) -> float:
    made = Ledger(storage, NAME, {})
    try:
        return _mean(lambda: made.note("looked", time.time()))
    finally:
        storage.delete_study(storage.get_study_id_from_name(NAME))


def _strangers(url: str, place: str) -> Finding:
    """Whether the database lets in by a wrong password, and so anyone."""
    engine = create_engine(make_url(url).set(password="wrong"), connect_args={"connect_timeout": 10})
    try:
        engine.connect().close()
    except SQLAlchemyError as error:
        if "password" in str(error):
            return ok("the ledger refuses a wrong password")
        return unseen("whether the ledger refuses a wrong password", first_line(error))
    finally:
        engine.dispose()
    return bad(f"the ledger {place} lets in by any password", "say scram-sha-256 in its pg_hba.conf, then reload it")


def tracker(uri: str) -> Findings:
    """Whether MLflow answers, is of this version, refuses strangers, and how fast it is."""
    os.environ.update(HABITS)
    if uri.startswith("http"):
        try:
            yield _anonymous(uri)
        except OSError as error:
            yield bad(f"MLflow at {uri} does not answer, {error}", f"{START}, or set MLFLOW_TRACKING_URI")
            return
        reply, problem = _version(uri)
        if problem:
            yield problem
            return
        if reply != mlflow.__version__:
            yield bad(
                f"MLflow at {uri} is {reply}, this one {mlflow.__version__}",
                "install the same there, then `cluster/services/services.sh upgrade`",
            )
    try:
        spent = _log_batch(mlflow.MlflowClient(uri))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        yield bad(f"MLflow at {uri} can't be written, {first_line(error)}", "its log says more: services.sh status")
        return
    yield ok(f"MLflow {mlflow.__version__} at {uri}: {POINTS} points in {spent:.0f} ms")


def anonymous(address: str) -> tuple[int, str]:
    """Status and text of a page, asked for by nobody in particular. Raises OSError where no one answers."""
    try:
        with urlopen(address, timeout=10) as reply:
            return reply.status, ""
    except HTTPError as error:
        with error:
            return error.code, error.read(200).decode(errors="replace").strip()


def _anonymous(uri: str) -> Finding:
    status, text = anonymous(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1")
    if status == HTTPStatus.UNAUTHORIZED:
        return ok("MLflow refuses who has no password (401)")
    if status == HTTPStatus.OK:
        return bad(f"MLflow at {uri} answers anyone", f"start it with --app-name basic-auth: {START}")
    return unseen("whether MLflow refuses who has no password", f"it answers {status}, {text}")


def _version(uri: str) -> tuple[str, Finding | None]:
    try:
        reply = http_request(get_default_host_creds(uri), "/version", "GET")
    except (MlflowException, RequestException) as error:
        return "", bad(f"MLflow at {uri} does not answer, {first_line(error)}", START)
    match reply.status_code:
        case HTTPStatus.OK:
            return reply.text.strip(), None
        case HTTPStatus.UNAUTHORIZED:
            way_out = "copy cluster/secrets/mlflow_credentials to ~/.mlflow/credentials (mode 600)"
            return "", bad(f"MLflow at {uri} refuses the password of this machine", way_out)
        case HTTPStatus.FORBIDDEN:
            way_out = "name that host in its --allowed-hosts"
            return "", bad(f"MLflow at {uri} refuses this host, {reply.text.strip()}", way_out)
    return "", bad(f"MLflow at {uri} answers {reply.status_code}, {reply.text.strip()}", "see its log")


def _log_batch(client: mlflow.MlflowClient) -> float:
    """Log to an experiment that is deleted again; in MLflow's bin the next doctor finds it."""
    found = client.get_experiment_by_name(NAME)
    if found is not None and found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    experiment = found.experiment_id if found is not None else client.create_experiment(NAME)
    try:
        runs = client.search_runs([experiment], run_view_type=ViewType.ACTIVE_ONLY, max_results=1)
        run = runs[0].info.run_id if runs else client.create_run(experiment).info.run_id

        def log() -> None:
            now = int(1000 * time.time())
            client.log_batch(run, [Metric(f"looked/{index}", 0.0, now, 0) for index in range(POINTS)])

        spent = _mean(log)
        client.set_terminated(run)
    finally:
        client.delete_experiment(experiment)
    return spent


def _mean(write: Callable[[], object]) -> float:
    """Milliseconds of a write."""
    began = time.perf_counter()
    for _ in range(TIMES):
        write()
    return 1000 * (time.perf_counter() - began) / TIMES
