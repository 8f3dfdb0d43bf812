"""What MLflow has of a study: the only door to it. Reads, and never writes."""

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlflow
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError

from dashboards import DashboardError
from studies.machinery.records import ARM, NOTE, TAG_KIND, TAG_STATE, TAG_STUDY

# What MLflow has to say of a tracker that fails is said here, in a line.
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

HABITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
RUNS = 10_000
"""What is asked for at once."""
OPENING = re.compile(r"(?:confirm|paper)-(\d+)")
"""Kinds of trainings that are measured on the test classes."""
DATA = "data.name"
"""The setting that says which data set a run is of."""


@dataclass(frozen=True)
class TrialRun:
    """A trial's run."""

    run_id: str
    kind: str
    state: str
    arm: str | None
    began: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """The latest value of each."""

    @property
    def opening(self) -> int | None:
        """The number of the opening of the test classes that it is a training of."""
        found = OPENING.fullmatch(self.kind)
        return int(found[1]) if found else None

    @property
    def ended(self) -> bool:
        """Whether it came to its end."""
        return self.state == "COMPLETE"


@dataclass(frozen=True)
class StudyRuns:
    """A study and its trials' runs, in the order in which they began."""

    name: str
    question: str
    runs: tuple[TrialRun, ...]
    over: frozenset[str]
    """Openings of the test classes of which all trainings have ended."""

    @property
    def title(self) -> str:
        """The first line of its question."""
        return self.question.strip().splitlines()[0]

    def opened(self) -> list[TrialRun]:
        """The trainings of the newest opening that is over; empty where there is none."""
        over = [run for run in self.runs if run.kind in self.over]
        newest = max((run.opening for run in over if run.opening is not None and run.ended), default=None)
        return [run for run in self.runs if newest is not None and run.opening == newest]


class Tracker:
    """An MLflow that was written to. Every method raises DashboardError where nobody answers."""

    def __init__(self, uri: str) -> None:
        """Raises DashboardError where there is no tracker at `uri`; none is made."""
        self.uri = uri
        self._address = _masked(uri)
        with self._answering():
            database = make_url(uri) if re.match(r"(sqlite|postgresql|mysql|mssql)[+:]", uri) else None
            if database is not None and database.get_backend_name() != "sqlite":
                # MLflow itself would try for two minutes.
                with create_engine(uri).connect():
                    pass
            elif database is not None and not Path(database.database or "").is_file():
                raise DashboardError(
                    f"MLflow's database must be there, got {self._address}: run a study first, name the folder that "
                    "studies wrote to with --runs, or set MLFLOW_TRACKING_URI"
                )

    def study(self, name: str) -> StudyRuns:
        """All runs of a study; where several of one name share the tracker, of the one that began last."""
        with self._answering():
            found = self._client.get_experiment_by_name(name)
            if found is None or found.lifecycle_stage == "deleted":
                raise self._unknown(name)
            runs = list(self._search(found))
        parents = [run for run in runs if MLFLOW_PARENT_RUN_ID not in run.data.tags and TAG_STUDY in run.data.tags]
        if not parents:
            raise self._unknown(name)
        parent = max(parents, key=lambda run: run.info.start_time)
        own = [_trial(run) for run in runs if _is_of(run, parent)]
        return StudyRuns(
            name,
            parent.data.tags.get(MLFLOW_RUN_NOTE, name),
            tuple(sorted((run for run in own if run.params), key=lambda run: run.began)),
            frozenset(run.info.run_name for run in runs if run.data.tags.get(TAG_KIND) == NOTE and _is_of(run, parent)),
        )

    def series(self, run: TrialRun, metric: str) -> list[float]:
        """A metric's values, by step."""
        with self._answering():
            points = self._client.get_metric_history(run.run_id, metric)
        return [point.value for point in sorted(points, key=lambda point: point.step)]

    def studies(self) -> list[str]:
        """The names of all experiments."""
        with self._answering():
            return sorted(experiment.name for experiment in self._client.search_experiments())

    def datasets(self) -> list[str]:
        """The data sets that some run is of."""
        with self._answering():
            experiments = self._client.search_experiments()
            return sorted({run.data.params[DATA] for each in experiments for run in self._search(each, asks=DATA)})

    def _search(self, experiment: Experiment, asks: str = "") -> Iterator[Run]:
        """Runs of an experiment; or the latest one that has a parameter, if that is what is asked."""
        token = None
        while True:
            page = self._client.search_runs(
                [experiment.experiment_id],
                f"params.`{asks}` != ''" if asks else "",
                max_results=1 if asks else RUNS,
                page_token=token,
            )
            yield from page
            token = page.token
            if asks or not token:
                return

    def _unknown(self, name: str) -> DashboardError:
        known = [study for study in self.studies() if study != "Default"]
        return DashboardError(f"unknown study {name!r}: {self._address} has {among(name, known)}")

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        os.environ.update({name: value for name, value in HABITS.items() if name not in os.environ})
        return mlflow.MlflowClient(self.uri)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except DashboardError:
            raise
        except (MlflowException, SQLAlchemyError, OSError, ImportError, ValueError) as error:
            reason = _masked((str(error).strip() or type(error).__name__).splitlines()[0])
            raise DashboardError(
                f"MLflow at {self._address} can't be read: {reason}. Set MLFLOW_TRACKING_URI, or name the folder that "
                "studies wrote to with --runs"
            ) from error


def among(name: str, known: list[str]) -> str:
    """Say what is known, and which of it may have been meant.

    >>> among("cub20", ["cub200", "sop"])
    "[cub200, sop]; did you mean 'cub200'?"
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"[{', '.join(known)}]" + (f"; did you mean {near[0]!r}?" if near else "")


def _masked(text: str) -> str:
    """An address, or what is said of it, without its password."""
    return re.sub(r":[^:/@\s]*@", ":***@", text)


def _is_of(run: Run, parent: Run) -> bool:
    return run.data.tags.get(TAG_STUDY) == parent.data.tags[TAG_STUDY]


def _trial(run: Run) -> TrialRun:
    tags = run.data.tags
    return TrialRun(
        run.info.run_id,
        tags.get(TAG_KIND, ""),
        tags.get(TAG_STATE, ""),
        tags.get(ARM),
        run.info.start_time,
        run.data.params,
        tags,
        run.data.metrics,
    )
