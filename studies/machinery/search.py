"""The ledger as Ray Tune's searcher and scheduler: Tune executes, the ledger decides.

Every report takes the same way, in the same order: the recorder, the ledger, the decision. A trial ends in the
recorder first and in the ledger last, so that a driver killed anywhere in between leaves it RUNNING, to be adopted.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from studies.machinery.ledger import Ledger, Row
from studies.machinery.progress import Progress
from studies.machinery.records import Kind, Record, State
from studies.machinery.tracking import Recorder
from studies.machinery.trial import Job


@dataclass(frozen=True)
class Series:
    """Trials of one kind: the ledger they are written down in, how many, toward what, and what each has to run."""

    kind: Kind
    ledger: Ledger
    trials: int
    goal: str
    job: Callable[[Row], Job]


class Stateless:
    """Keeps out of Tune's snapshots, which nothing is ever restored from: the ledger is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class LedgerSearch(Stateless, Searcher):  # type: ignore[misc]
    """Give Tune the trials of each series in turn: those left RUNNING first, then new ones until its number is full.

    None begins after the deadline, a time of `time.monotonic`; those that run then run to their end.
    """

    def __init__(self, plan: Sequence[Series], deadline: float) -> None:
        super().__init__()
        self._plan = plan
        self._deadline = deadline

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return a Tune config with the job of the next trial, or FINISHED."""
        if time.monotonic() < self._deadline:
            for series in self._plan:
                row = series.ledger.next(series.trials)
                if row is not None:
                    return {"job": series.job(row)}
        return str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the scheduler has told the ledger."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


class LedgerScheduler(Stateless, FIFOScheduler):  # type: ignore[misc]
    """Take every report to recorder and ledger, and stop what the ledger's pruner gives up."""

    def __init__(self, plan: Sequence[Series], recorder: Recorder, progress: Progress) -> None:
        super().__init__()
        self._series = {series.kind: series for series in plan}
        self._recorder = recorder
        self._progress = progress

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Open the trial's run, or open it again."""
        job, ledger = self._of(trial)
        run_id = self._recorder.begin(job.kind, ledger.row(job.number), job.settings)
        ledger.note_of(job.number, "mlflow_run", run_id)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Write the record down; stop the trial where that was its last, or where it is given up."""
        job, ledger = self._of(trial)
        record: Record = result["record"]
        goal = record.metrics.get(self._series[job.kind].goal)
        self._recorder.log(job.kind, job.number, record)
        if goal is not None:
            ledger.report(job.number, record.epoch, goal)
        if record.last:
            self._end(trial, "COMPLETE", goal, metrics=dict(record.metrics))
        elif goal is not None and ledger.should_prune(job.number, record.epoch):
            self._end(trial, "PRUNED", None, metrics=dict(record.metrics))
        else:
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Fail a trial that returned before its last epoch."""
        job, ledger = self._of(trial)
        if ledger.in_hand(job.number):
            self._end(trial, "FAIL", None, reason="the trial returned before its last epoch")

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Fail a trial that raised, or whose worker died, with the reason."""
        self._end(trial, "FAIL", None, reason=_reason(trial))

    def _end(self, trial: Trial, state: State, value: float | None, **notes: Any) -> None:
        job, ledger = self._of(trial)
        self._recorder.end(job.kind, job.number, state, notes.get("reason", ""))
        row = ledger.end(job.number, state, value, **notes)
        self._progress.ended(job.kind, row)

    def _of(self, trial: Trial) -> tuple[Job, Ledger]:
        job: Job = trial.config["job"]
        return job, self._series[job.kind].ledger


class Interrupt(Stateless, Stopper):  # type: ignore[misc]
    """Stop everything where it is, once set; the ledger keeps what runs as RUNNING."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether it is set."""
        return self.event.is_set()


def _reason(trial: Trial) -> str:
    """What the trial raised, or what became of its worker, in a line."""
    with Path(trial.pickled_error_file).open("rb") as file:
        error = cloudpickle.load(file)
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"
