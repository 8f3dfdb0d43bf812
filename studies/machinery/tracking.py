"""The recorder: a study as an MLflow experiment, one parent run, a child run for every trial. Lives in the driver.

A point's time is its trial's begin plus the seconds of work until then, so that a point sent a second time is the
same row of MLflow's database; epochs that a run has already are not sent again.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_NOTE, MLFLOW_PARENT_RUN_ID

from studies.machinery.ledger import Row
from studies.machinery.records import (
    FINISHED,
    RUN_STATUS,
    SECONDS,
    TAG_KIND,
    TAG_REASON,
    TAG_STATE,
    TAG_TRIAL,
    Kind,
    Record,
    State,
    describe,
    trial_id,
)

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)

BATCH = 1000
"""Points that MLflow takes in one call."""
SYSTEM_METRICS_EVERY = 5
"""Seconds between two looks at the machine."""


class TrackerError(ValueError):
    """A tracker that can't be reached, or an address that is none."""


class Recorder:
    """Writes one study's trials to MLflow; `close` leaves no run RUNNING."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None) -> None:
        """Open the experiment, making MLflow's schema and the experiment where they are missing.

        Raises TrackerError where nothing answers at `uri`.
        """
        self._uri = uri
        try:
            self._client = mlflow.MlflowClient(uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment: str = found.experiment_id if found else self._make(experiment, artifacts)
        except (MlflowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise TrackerError(f"MLflow at {uri} can't be used: {reason}") from error
        self._runs: dict[tuple[Kind, int], str] = {}
        self._began: dict[str, int] = {}
        self._recorded: dict[str, set[int]] = {}
        self._left = self._left_running()

    def set_aside(self, experiment: str, stamp: str) -> None:
        ...
