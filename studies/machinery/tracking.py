"""The recorder: a study as an MLflow experiment, one parent run, a child run for every trial. Lives in the driver.

A point's time is its trial's begin plus the seconds of work until then, so that a point sent a second time is the
same row of MLflow's database; epochs that a run has already are not sent again.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import mlflow
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from hdml_core.config import ConfigError, Setting
from studies.machinery.ledger import Row
from studies.machinery.records import (
    RUN_STATUS,
    SECONDS,
    TAG_KIND,
    TAG_REASON,
    TAG_STATE,
    TAG_TRIAL,
    Kind,
    Record,
    State,
    run_name,
    trial_id,
)

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# MLflow's own patience with a server that does not answer is four minutes, before anything is said.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

BATCH = 1000
"""Points that MLflow takes in one call."""
SYSTEM_METRICS_EVERY = 5
"""Seconds between two looks at the machine."""


class TrackerError(ConfigError):
    """A tracker that can't be reached, or an address that is none."""


class Recorder:
    """Writes one study's trials to MLflow. As a context, once opened, it leaves no run RUNNING."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        """Open the experiment; make MLflow's schema and the experiment where they are missing.

        Raises TrackerError where nothing answers at `uri`.
        """
        self._uri = uri
        try:
            self._client = mlflow.MlflowClient(uri)
            found = self._client.get_experiment_by_name(experiment)
            place = f"{artifacts.as_uri()}/{experiment}" if artifacts else None
            self.experiment: str = found.experiment_id if found else self._client.create_experiment(experiment, place)
        except (MlflowException, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TrackerError(f"MLflow at {uri} can't be used: {reason}") from error
        self._tags: dict[str, str] = {}
        self._live: dict[tuple[Kind, int], Run] = {}
        self._recorded: dict[str, set[int]] = {}

    def set_aside(self, name: str) -> None:
        """Rename the experiment, its runs ended; the recorder is of no use after that."""
        for run in self._running():
            self._client.set_terminated(run.info.run_id, RUN_STATUS["RUNNING"])
        self._client.rename_experiment(self.experiment, name)

    def open(self, name: str, question: str, tags: Mapping[str, str], run_id: str | None) -> str:
        """Open the parent run, a new one or that of earlier drivers; return its id. Every run gets the tags."""
        self._tags = dict(tags)
        self._left = {
            (run.data.tags[TAG_KIND], run.data.tags[TAG_TRIAL]): run.info.run_id
            for run in self._running()
            if TAG_TRIAL in run.data.tags
        }
        if run_id is None:
            run = self._client.create_run(self.experiment, run_name=name, tags={**tags, MLFLOW_RUN_NOTE: question})
            run_id = run.info.run_id
        else:
            self._client.update_run(run_id, "RUNNING")
        self._parent = run_id
        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=SYSTEM_METRICS_EVERY, resume_logging=True, tracking_uri=self._uri
        )
        self._monitor.start()
        return run_id

    def begin(self, kind: Kind, row: Row, settings: Mapping[str, Setting]) -> str:
        """Open the trial's run, a new one or the one that it had; return its id."""
        adopted = row.notes["attempts"] > 1
        # A driver killed before it noted the run's id left the run RUNNING, under the trial's tags.
        left = self._left.get((kind, trial_id(row.number))) if adopted else None
        run_id = row.notes.get("mlflow_run", left)
        if run_id is None:
            tags = {
                **self._tags,
                TAG_KIND: kind,
                TAG_TRIAL: trial_id(row.number),
                TAG_STATE: "RUNNING",
                MLFLOW_PARENT_RUN_ID: self._parent,
            }
            name = run_name(kind, row.number, row.params)
            run = self._client.create_run(self.experiment, _milliseconds(row), tags, name)
            params = [Param(name, str(value)) for name, value in settings.items()]
            self._client.log_batch(run.info.run_id, params=params)
        else:
            self._client.update_run(run_id, "RUNNING")
            run = self._client.get_run(run_id)
        history = self._client.get_metric_history(run.info.run_id, SECONDS) if adopted else []
        self._recorded[run.info.run_id] = {point.step for point in history}
        self._live[kind, row.number] = run
        return str(run.info.run_id)

    def log(self, kind: Kind, number: int, record: Record) -> None:
        """Send a record's metrics and trace, unless the run has that epoch."""
        run = self._live[kind, number]
        recorded = self._recorded[run.info.run_id]
        if record.step in recorded:
            return
        time = run.info.start_time + int(1000 * record.seconds)
        points = [Metric(name, value, time, step) for name, trace in record.trace.items() for step, value in trace]
        # SECONDS comes last: a run that has it has the whole epoch.
        ordered = sorted(record.metrics.items(), key=lambda metric: metric[0] == SECONDS)
        points += [Metric(name, value, time, record.step) for name, value in ordered]
        tags = [RunTag(name, value) for name, value in record.tags.items()]
        for first in range(0, len(points), BATCH):
            self._client.log_batch(run.info.run_id, metrics=points[first : first + BATCH], tags=tags)
        recorded.add(record.step)

    def end(self, kind: Kind, number: int, state: State, reason: str = "") -> None:
        """Give the trial's run its state, the reason if it failed, and its status."""
        run_id = self._live.pop((kind, number)).info.run_id
        tags = [RunTag(TAG_STATE, state)] + ([RunTag(TAG_REASON, reason)] if reason else [])
        self._client.log_batch(run_id, tags=tags)
        self._client.set_terminated(run_id, RUN_STATUS[state])

    def note(self, name: str, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Record what is no trial, in a run of its own."""
        run = self._client.create_run(self.experiment, None, {**tags, MLFLOW_PARENT_RUN_ID: self._parent}, name)
        points = [Metric(key, value, run.info.start_time, 0) for key, value in metrics.items()]
        self._client.log_batch(run.info.run_id, points)
        self._client.set_terminated(run.info.run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """End the parent run truthfully, and every run that is still open as interrupted."""
        self._monitor.finish()
        for run in self._running():
            if run.info.run_id != self._parent:
                self._client.set_terminated(run.info.run_id, RUN_STATUS["RUNNING"])
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        status = "FINISHED" if kind is None else "KILLED" if interrupted else "FAILED"
        self._client.set_terminated(self._parent, status)

    def _running(self) -> list[Run]:
        runs = self._client.search_runs([self.experiment], "attributes.status = 'RUNNING'")
        return list(runs)


def _milliseconds(row: Row) -> int:
    return int(1000 * row.began.timestamp())
