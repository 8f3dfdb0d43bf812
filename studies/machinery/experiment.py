"""A study in MLflow: an experiment, one parent run, a child run for every trial. Told what happened, it sees to them.

It may be told the same event any number of times, by one driver after another: a run is looked for before it is made,
an epoch that a run has is not logged again, and a point's time is its trial's begin plus the seconds of work until
then, so that a point sent twice is the same row of MLflow's database. A run has the status of its latest attempt, and
the study that of its latest driver: what an earlier one is late to say changes nothing.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.rest_utils import http_request_safe
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError

from hdml_core.config import ConfigError
from studies.machinery.records import (
    NOTE,
    RUN_STATUS,
    SECONDS,
    TAG_ATTEMPT,
    TAG_DRIVER,
    TAG_KIND,
    TAG_REASON,
    TAG_STATE,
    TAG_STUDY,
    TAG_TRIAL,
    TRACE_POINTS,
    State,
    trial_id,
)
from studies.machinery.storage import make_whole

# What MLflow has to say of a tracker that fails is said here, in a line.
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

HABITS = {
    # A retry of MLflow's own makes a run twice where only the reply to the first was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
DATABASE_SERVERS = ("postgresql", "mysql", "mssql")

# What MLflow takes in a call: 1,000 things, 100 of them parameters or tags.
POINTS, PARAMS = 900, 100
# What it gives in one: runs, and points of several runs.
RUNS = 50_000
BULK, BULK_POINTS = "/ajax-api/2.0/mlflow/metrics/get-history-bulk", 25_000

PARENT = "study"
"""The parent run's kind."""

UNANSWERED = (MlflowException, SQLAlchemyError, OSError)
NONSENSE = (LookupError, TypeError, ValueError)
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


class TrackerError(ConfigError):
    """A tracker that can't be reached, or an address that is none."""


class SeenRun(NamedTuple):
    """A run as MLflow has it."""

    kind: str
    trial: int | None
    """None of the parent run and of notes."""
    run_id: str
    status: str
    state: str | None
    metrics: Mapping[str, float]
    """The latest value of each."""


@dataclass
class KnownRun:
    """A run, and what is on its way to it."""

    run_id: str
    began: int
    """In milliseconds, as all times of MLflow."""
    steps: set[int]
    """The epochs that it has, by their last step."""
    points: list[Metric] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


class Said(NamedTuple):
    """Who says it, and when, in milliseconds."""

    driver: str
    time: int


class Experiment:
    """One study's runs. Every method raises TrackerError where nobody answers."""

    def __init__(
        self, uri: str, study: str, study_id: str, artifacts: Path | None = None, driver: str | None = None
    ) -> None:
        """Several studies of one name may share a tracker, told apart by `study_id`.

        `artifacts` is where MLflow's files are kept if no server keeps them, `driver` whose own experiment this is: any
        other that is heard here is gone. Raises TrackerError where there can be no tracker at `uri`; that none answers
        just now is no error.
        """
        self.uri = uri
        self._study = study
        self._study_id = study_id
        self._driver = driver
        self._place = f"{artifacts.as_uri()}/{study}" if artifacts else None
        self._id = ""
        self._known: dict[tuple[str, int | None], KnownRun] = {}
        self.run_ids: dict[tuple[str, int | None], str] = {}
        """Of trials in hand, as soon as they are known."""
        with self._answering():
            _check(uri)

    def tell(self, events: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
        """Take events in; return those that MLflow will never take, with the reason.

        Raises TrackerError where they have to wait; they may then have been taken in part.
        """
        with self._answering():
            self._id = self._id or self._find_experiment() or self._make_experiment()
            try:
                for event in events:
                    self._take(**event)
                self._flush()
            except (*UNANSWERED, *NONSENSE) as error:
                # Of what was on its way nobody knows how much arrived.
                self._known.clear()
                self._id = ""
                if not _is_refusal(error):
                    raise
                if len(events) == 1:
                    return [(events[0], _line(error))]
                return [refused for event in events for refused in self.tell([event])]
        return []

    def runs(self) -> list[SeenRun]:
        """All runs of the study."""
        with self._answering():
            return [_seen(run) for run in self._search(f"tags.{TAG_STUDY} = '{self._study_id}'")]

    def series(self, runs: Sequence[SeenRun], metric: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) points of a metric by run id, in the order of their time."""
        points: dict[str, list[tuple[int, float]]] = {run.run_id: [] for run in runs}
        with self._answering():
            if not self.uri.startswith("http"):
                for run_id, own in points.items():
                    own += [(point.step, point.value) for point in self._client.get_metric_history(run_id, metric)]
                return points
            # A server takes a minute to be asked for a thousand runs one by one.
            for some in _slices(list(points), BULK_POINTS // TRACE_POINTS):
                asked = {"run_id": some, "metric_key": metric, "max_results": BULK_POINTS}
                reply = http_request_safe(get_default_host_creds(self.uri), BULK, "GET", params=asked)
                for point in reply.json()["metrics"]:
                    points[point["run_id"]].append((point["step"], point["value"]))
        return points

    def end(self, kind: str, number: int, attempt: int, state: State, reason: str) -> None:
        """Have a trial's run, the only one of it, end as the trial did."""
        with self._answering():
            self._end(Said("", now()), kind, number, attempt, state, reason)

    def end_running(self) -> None:
        """End as interrupted the study's runs that are RUNNING."""
        with self._answering():
            self._end_all(f"attributes.status = 'RUNNING' and tags.{TAG_STUDY} = '{self._study_id}'")

    def set_aside(self, name: str) -> None:
        """Rename the experiment, all its runs ended."""
        with self._answering():
            self._end_all("attributes.status = 'RUNNING'")
            found = self._find_experiment()
            if found is not None:
                self._client.rename_experiment(found, name)

    def _take(self, do: str, driver: str, time: int, **what: Any) -> None:
        ways: Mapping[str, Callable[..., None]] = {
            "open": self._open,
            "begin": self._begin,
            "log": self._log,
            "end": self._end,
            "attach": self._attach,
            "note": self._note,
            "observe": self._observe,
            "close": self._close,
        }
        ways[do](Said(driver, time), **what)

    def _open(self, said: Said, question: str, tags: Mapping[str, str]) -> None:
        if self._find(PARENT) is None:
            self._create(PARENT, None, said.time, self._study, tags)
        self._client.log_batch(self._look_up(PARENT).run_id, tags=_tags({**tags, MLFLOW_RUN_NOTE: question}))
        self._run_again(said)

    def _begin(
        self,
        said: Said,
        kind: str,
        number: int,
        attempt: int,
        began: int,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
    ) -> None:
        self._flush()
        run = self._find(kind, number) or self._create(kind, number, began, name, tags)
        run_id = run.info.run_id
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for some in _slices(new, PARAMS):
            self._client.log_batch(run_id, params=some)
        if attempt > _attempt(run):
            self._client.update_run(run_id, "RUNNING")
            self._run_again(said)
            self._client.log_batch(run_id, tags=_tags({TAG_ATTEMPT: str(attempt), TAG_STATE: "RUNNING"}))
        self._know(kind, number, run)

    def _log(
        self,
        said: Said,
        kind: str,
        number: int,
        step: int,
        seconds: float,
        metrics: Mapping[str, float],
        trace: Mapping[str, Sequence[tuple[int, float]]],
        tags: Mapping[str, str],
    ) -> None:
        run = self._look_up(kind, number)
        if step in run.steps:
            return
        time = run.began + int(1000 * seconds)
        run.points += [Metric(key, value, time, at) for key, points in trace.items() for at, value in points]
        # SECONDS comes last: a run that has it has the whole epoch.
        ordered = sorted(metrics.items(), key=lambda metric: metric[0] == SECONDS)
        run.points += [Metric(key, value, time, step) for key, value in ordered]
        run.tags |= tags
        run.steps.add(step)

    def _end(self, said: Said, kind: str, number: int, attempt: int, state: State, reason: str) -> None:
        self._flush()
        run = self._find(kind, number)
        if run is None:
            raise _deleted(kind, number)
        if attempt >= _attempt(run):
            tags = {TAG_STATE: state} | ({TAG_REASON: reason} if reason else {})
            self._client.log_batch(run.info.run_id, tags=_tags(tags))
            self._client.set_terminated(run.info.run_id, RUN_STATUS[state], said.time)
        self._known.pop((kind, number), None)
        self.run_ids.pop((kind, number), None)

    def _attach(self, said: Said, kind: str, number: int, name: str, text: str) -> None:
        self._client.log_text(self._look_up(kind, number).run_id, text, f"logs/{name}")

    def _note(self, said: Said, name: str, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        run = self._only(f"attributes.run_name = '{name}' and tags.{TAG_STUDY} = '{self._study_id}'")
        run = run or self._create(tags.get(TAG_KIND, NOTE), None, said.time, name, tags)
        if run.info.status == "RUNNING":
            points = [Metric(key, value, run.info.start_time, 0) for key, value in metrics.items()]
            self._client.log_batch(run.info.run_id, points)
            self._client.set_terminated(run.info.run_id, "FINISHED", said.time)

    def _observe(self, said: Said, metrics: Mapping[str, float]) -> None:
        run = self._look_up(PARENT)
        step = said.time - run.began
        run.points += [Metric(f"system/{key}", value, said.time, step) for key, value in metrics.items()]

    def _close(self, said: Said, status: str | None, in_hand: Sequence[tuple[str, int, int]]) -> None:
        self._flush()
        for kind, number, attempt in in_hand:
            run = self._find(kind, number)
            if run is not None and attempt >= _attempt(run):
                self._client.set_terminated(run.info.run_id, RUN_STATUS["RUNNING"], said.time)
        parent = self._client.get_run(self._look_up(PARENT).run_id)
        # What was ended is ended otherwise by none but the driver that it ran for last.
        if status is not None and (
            parent.info.status == "RUNNING"
            or (_last_driver(parent).driver == said.driver and not self._is_late(said, parent.info.end_time))
        ):
            self._client.set_terminated(parent.info.run_id, status, said.time)
        self._known.clear()

    def _run_again(self, said: Said) -> None:
        """Have the study RUNNING, for this driver, unless another has had it so since."""
        parent = self._client.get_run(self._look_up(PARENT).run_id)
        if not self._is_late(said, _last_driver(parent).time):
            self._client.log_batch(parent.info.run_id, tags=_tags({TAG_DRIVER: f"{said.driver} {said.time}"}))
            self._client.update_run(parent.info.run_id, "RUNNING")

    def _is_late(self, said: Said, time: int) -> bool:
        """Whether it was said before the time; what this driver says, which lives, is no older than it is heard."""
        return said.driver != self._driver and said.time < time

    def _flush(self) -> None:
        for run in self._known.values():
            for some in _slices(run.points, POINTS) or [[]]:
                self._client.log_batch(run.run_id, some, tags=_tags(run.tags))
            run.points, run.tags = [], {}

    def _look_up(self, kind: str, number: int | None = None) -> KnownRun:
        if (kind, number) not in self._known:
            run = self._find(kind, number)
            if run is None and kind == PARENT:
                run = self._create(PARENT, None, now(), self._study, {})
            if run is None:
                raise _deleted(kind, number)
            self._know(kind, number, run)
        return self._known[kind, number]

    def _know(self, kind: str, number: int | None, run: Run) -> None:
        run_id = run.info.run_id
        steps = {point.step for point in self._client.get_metric_history(run_id, SECONDS)}
        self._known[kind, number] = KnownRun(run_id, run.info.start_time, steps)
        self.run_ids[kind, number] = run_id

    def _find(self, kind: str, number: int | None = None) -> Run | None:
        return self._only(" and ".join(f"tags.{key} = '{value}'" for key, value in self._own(kind, number).items()))

    def _create(self, kind: str, number: int | None, time: int, name: str, tags: Mapping[str, str]) -> Run:
        under = {} if kind == PARENT else {MLFLOW_PARENT_RUN_ID: self._look_up(PARENT).run_id}
        return self._client.create_run(self._id, time, {**tags, **under, **self._own(kind, number)}, name)

    def _own(self, kind: str, number: int | None) -> dict[str, str]:
        return {TAG_STUDY: self._study_id, TAG_KIND: kind} | ({} if number is None else {TAG_TRIAL: trial_id(number)})

    def _only(self, asked: str) -> Run | None:
        """The one run that is asked for; where a slow server has made it twice, the one that was written to."""
        runs = self._search(asked)
        runs.sort(key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.run_id))
        for double in runs[1:]:
            self._client.delete_run(double.info.run_id)
        return runs[0] if runs else None

    def _search(self, asked: str) -> list[Run]:
        experiment = self._id or self._find_experiment()
        return list(self._client.search_runs([experiment], asked, max_results=RUNS)) if experiment else []

    def _end_all(self, asked: str) -> None:
        for run in self._search(asked):
            self._client.set_terminated(run.info.run_id, RUN_STATUS["RUNNING"])

    def _find_experiment(self) -> str | None:
        """Its id, restored where it was deleted."""
        found = self._client.get_experiment_by_name(self._study)
        if found is None:
            return None
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _make_experiment(self) -> str:
        try:
            return str(self._client.create_experiment(self._study, self._place))
        except MlflowException as error:
            # Another driver may have made it since it was looked for.
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or (found := self._find_experiment()) is None:
                raise
            return found

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        return _connect(self.uri)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (*UNANSWERED, ImportError, ValueError) as error:
            address = re.sub(r":[^:/@]*@", ":***@", self.uri)
            raise TrackerError(f"MLflow at {address} can't be used: {_line(error)}") from error


class Machine:
    """What the driver's machine is busy with, by MLflow's names."""

    def __init__(self) -> None:
        self._monitors = []
        for monitor in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            # Without a GPU, or without the library that reads it, there is none to look at.
            with suppress(ImportError, RuntimeError):
                self._monitors.append(monitor())

    def look(self) -> dict[str, float]:
        """Memory in MB, loads and shares in percent, traffic in MB since the first look, power in watts."""
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return metrics


def now() -> int:
    """The time in milliseconds."""
    return int(1000 * time.time())


def _check(uri: str) -> None:
    """Find out what can be known of an address without asking a server."""
    address = urlsplit(uri)
    if address.scheme in ("http", "https") and not (address.hostname and address.port != 0):
        raise ValueError("it must be http://HOST or http://HOST:PORT")
    if _scheme(uri) in DATABASE_SERVERS:
        create_engine(uri)
    elif _scheme(uri) == "sqlite":
        _make_schema(uri)
    else:
        _connect(uri)


def _connect(uri: str) -> mlflow.MlflowClient:
    """A client of MLflow; makes the schema of a database that has none."""
    os.environ.update(HABITS)
    if _scheme(uri) in DATABASE_SERVERS:
        # MLflow itself would try for two minutes.
        with create_engine(uri).connect():
            pass
    if _scheme(uri) == "sqlite":
        _make_schema(uri)
    return mlflow.MlflowClient(uri)


def _make_schema(uri: str) -> None:
    # A driver that is killed while MLflow makes its schema, or two that make it at once, would spoil it.
    os.environ.update(HABITS)
    make_whole(Path(make_url(uri).database or ""), mlflow.MlflowClient)


def _scheme(uri: str) -> str:
    return re.split(r"[+:]", uri)[0]


def _seen(run: Run) -> SeenRun:
    tags = run.data.tags
    trial = int(tags[TAG_TRIAL]) if TAG_TRIAL in tags else None
    return SeenRun(tags[TAG_KIND], trial, run.info.run_id, run.info.status, tags.get(TAG_STATE), run.data.metrics)


def _attempt(run: Run) -> int:
    return int(run.data.tags.get(TAG_ATTEMPT, 0))


def _last_driver(parent: Run) -> Said:
    driver, _, time = parent.data.tags.get(TAG_DRIVER, " 0").partition(" ")
    return Said(driver, int(time))


def _deleted(kind: str, number: int | None) -> LookupError:
    return LookupError(f"the run of {kind} {number} is not there any longer")


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    return not isinstance(error, UNANSWERED)


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in tags.items()]


def _slices(things: list[Any], most: int) -> list[list[Any]]:
    return [things[first : first + most] for first in range(0, len(things), most)]


def _line(error: BaseException) -> str:
    """What went wrong, where a library wraps it too."""
    return (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
