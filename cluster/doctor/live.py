"""A cluster that runs: reached, every node of it asked, and what the driver needs beside it: ledger and MLflow."""

import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor import node
from cluster.doctor.finding import Finding, Findings, bad, count, first_line, ok, unseen
from cluster.doctor.judge import Here, judge
from cluster.doctor.services import anonymous, ledger, tracker
from hdml_core.datasets import data_root
from studies.machinery import audit
from studies.machinery.cli import out_folder
from studies.machinery.driver import Places, commit
from studies.machinery.resources import RAY_HABITS, may_come
from studies.machinery.storage import LedgerError

PATIENCE = 180.0
"""Seconds for all looks at all nodes together; each look has less."""
CLOCK_PATIENCE, CLOCK_TRIES = 10.0, 3
START = "`ray up`, or set RAY_ADDRESS to where one is"
COPY_TOKEN = "copy ~/.ray/auth_token of the head to this machine, and set RAY_AUTH_MODE=token"
USE_TOKEN = "start Ray with RAY_AUTH_MODE=token on all nodes, each with the same ~/.ray/auth_token"

LET_IN, REFUSED = 10, 11
KNOCK = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
except AuthenticationError:
    sys.exit({REFUSED})
sys.exit({LET_IN})
"""


def examine(address: str) -> Findings:
    """Look at the cluster at an address, as RAY_ADDRESS has it, and at the services."""
    places, writable = _places()
    yield writable
    with _joined(address) as (problem, dashboard):
        yield from [problem] if problem else _cluster(places, dashboard)
    # Of what HDML_OUT would hold there is nothing to be looked at where it can't be written.
    ledger_url = places.ledger_url if places else os.environ.get("HDML_LEDGER")
    tracking_uri = places.tracking_uri if places else os.environ.get("MLFLOW_TRACKING_URI")
    yield from ledger(ledger_url) if ledger_url else [unseen("ledger", "it would be in HDML_OUT")]
    yield from tracker(tracking_uri) if tracking_uri else [unseen("MLflow", "it would be in HDML_OUT")]


def _places() -> tuple[Places | None, Finding]:
    try:
        places = Places.under(out_folder(None))
    except LedgerError as error:
        return None, bad(str(error), "make it, owned by who runs studies, or set HDML_OUT elsewhere")
    return places, ok(f"HDML_OUT {places.out} can be written")


@contextmanager
def _joined(address: str) -> Iterator[tuple[Finding | None, str]]:
    """Be in the cluster and know its dashboard, or have a line that says why not."""
    problem, dashboard = _unreached(address), ""
    if problem is None:
        os.environ.update(RAY_HABITS)
        try:
            context = ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
            dashboard = context.dashboard_url or ""
        except AuthenticationError as error:
            problem = bad(f"Ray at {address} does not let this machine in, {first_line(error)}", COPY_TOKEN)
        except (ConnectionError, RuntimeError, ValueError) as error:
            problem = bad(f"no Ray at {address}, {first_line(error)}", f"{START}; where one runs, {COPY_TOKEN}")
    try:
        yield problem, dashboard
    finally:
        ray.shutdown()


def _unreached(address: str) -> Finding | None:
    """What keeps this machine from an address of the kind HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return bad(f"no Ray at {address}, {error}", START)
    if _knock(address, os.environ) == REFUSED:
        return bad(f"Ray at {address} refuses the token of this machine", COPY_TOKEN)
    return None


def _knock(address: str, environment: Mapping[str, str]) -> int:
    """Ask a cluster for its nodes, from a process of its own: Ray looks at the environment only once."""
    command = [sys.executable, "-c", KNOCK, address]
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode
    return 0


def _cluster(places: Places | None, dashboard: str) -> Findings:
    """Look at Ray and at every node of it."""
    alive = [each for each in ray.nodes() if each["Alive"]]
    yield ok(f"Ray {ray.__version__} at {ray.get_runtime_context().gcs_address}: {count(len(alive), 'node')}")
    if coming := may_come():
        yield unseen(f"{count(len(coming), 'node')} that may still come", "again once they are there")
    token = _asks_for_token()
    yield _token(token)
    yield _dashboard(dashboard)
    mark = f".doctor-{uuid.uuid4().hex}"
    with _marked(places, mark):
        here = Here(node.versions(), node.source(), commit(), os.environ.get("HDML_ARCHIVES", ""), token)
        out = places.out if places else None
        yield from _nodes(alive, node.Asked(data_root().expanduser().absolute(), out, mark, 0, 0), here)


@contextmanager
def _marked(places: Places | None, mark: str) -> Iterator[None]:
    path = places.out / mark if places else None
    if path:
        path.touch()
    try:
        yield
    finally:
        if path:
            path.unlink(missing_ok=True)


def _nodes(alive: list[Mapping[str, Any]], asked: node.Asked, here: Here) -> Findings:
    """Ask every node everything; judge what they say."""
    # By value, so that a node answers with this very code, whichever program it has, or none.
    for module in (node, audit):
        cloudpickle.register_pickle_by_value(module)
    try:
        answers = {}
        for each in alive:
            own = each["Resources"]
            question = asked._replace(gpus=own.get("GPU", 0.0), object_store=own.get("object_store_memory", 0.0))
            answers[_name(each)] = _on(node.look, each).remote(question)
        ready, _ = ray.wait([*answers.values()], num_returns=len(answers), timeout=PATIENCE)
        said: dict[str, dict[str, Any]] = defaultdict(dict)
        failed: dict[str, dict[str, str]] = defaultdict(dict)
        for name, answer in answers.items():
            if answer not in ready:
                ray.cancel(answer, force=True)
                yield bad(f"{name} does not answer within {PATIENCE:.0f} s", "see `ray status -v`, or end that node")
                continue
            try:
                found, not_found = ray.get(answer)
            except RayError as error:
                yield bad(f"{name} can't be looked at, {_last_line(error)}", "see /tmp/ray/session_latest/logs there")
                continue
            for look, own in found.items():
                said[look][name] = own
            for look, why in not_found.items():
                failed[look][name] = why
        answering = [each for each in alive if _name(each) in said["versions"] or _name(each) in failed["versions"]]
        for each in answering:
            try:
                said["clocks"][_name(each)] = _ahead(each)
            except (RayError, TimeoutError) as error:
                failed["clocks"][_name(each)] = first_line(error)
    finally:
        for module in (node, audit):
            cloudpickle.unregister_pickle_by_value(module)
    yield from judge(said, failed, here)


def _on(function: Any, each: Mapping[str, Any]) -> Any:
    """A function as a task of a node that takes none of what trials need."""
    there = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)


def _name(each: Mapping[str, Any]) -> str:
    return f"{each['NodeManagerHostname']} ({each['NodeManagerAddress']}, {each['NodeID'][:8]})"


def _ahead(each: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds by which a node's clock is ahead of this one, and how sure that is: half the quickest round trip."""
    task = _on(node.clock, each)
    tries = []
    for _ in range(CLOCK_TRIES):
        asked = time.time()
        told = ray.get(task.remote(), timeout=CLOCK_PATIENCE)
        answered = time.time()
        tries.append(((answered - asked) / 2, told - (asked + answered) / 2))
    doubt, ahead = min(tries)
    return ahead, doubt


def _asks_for_token() -> bool | None:
    """Whether Ray refuses who comes without its token; None where it does not answer."""
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    with TemporaryDirectory() as home:
        stranger = without | {"RAY_AUTH_MODE": "disabled", "HOME": home}
        return {LET_IN: False, REFUSED: True}.get(_knock(ray.get_runtime_context().gcs_address, stranger))


def _token(asked_for: bool | None) -> Finding:
    match asked_for:
        case True:
            return ok("Ray refuses who has no token")
        case False:
            return bad("Ray lets anyone who reaches it run anything", USE_TOKEN)
    return unseen("whether Ray refuses who has no token", "it did not answer")


def _dashboard(address: str) -> Finding:
    """Whether the dashboard takes jobs, which are shell commands, from strangers."""
    if not address:
        return unseen("whether the dashboard refuses who has no token", "there is none, and so no `ray job submit`")
    try:
        status, text = anonymous(f"http://{address}/api/jobs/")
    except OSError as error:
        return unseen("whether the dashboard refuses who has no token", f"{address} does not answer here, {error}")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return ok(f"the dashboard at {address} refuses who has no token ({status})")
    if status == HTTPStatus.OK:
        return bad(f"the dashboard at {address} takes jobs from anyone", USE_TOKEN)
    return unseen("whether the dashboard refuses who has no token", f"{address} answers {status}, {text}")


def _last_line(error: BaseException) -> str:
    """Of a task's error: what was raised over there."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
