"""The ledger as Ray Tune's searcher and scheduler: Tune executes, the ledger decides.

Every report takes the same way, in the same order: the recorder's log, the ledger, the decision. A trial ends in the
log first and in the ledger last, so that a driver killed anywhere in between leaves it RUNNING, to be adopted.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from studies.machinery.lease import LeaseLostError
from studies.machinery.ledger import (
    CHECKPOINTS,
    CRASHES,
    EPOCHS,
    LOST_AT,
    METRICS,
    MLFLOW_RUN,
    REASON,
    SPENT,
    Ledger,
    Row,
)
from studies.machinery.postmortem import examine
from studies.machinery.progress import Progress
from studies.machinery.records import GPU_SECONDS, SECONDS, Kind, Record, State
from studies.machinery.storage import LedgerError
from studies.machinery.tracking import Recorder
from studies.machinery.worker import HOPELESS, FreshProcessError, Job

MOST_LOSSES = 10
"""So many machines a trial may lose between two epochs; one more counts like a crash, for it may be the trial's doing.
"""


@dataclass(frozen=True)
class Series:
    """Trials of one kind: the ledger they are written down in, how many, toward what, and what each has to run."""

    kind: Kind
    ledger: Ledger
    trials: int
    goals: Sequence[str]
    job: Callable[[Row], Job]
    limits: Mapping[str, float] = field(default_factory=dict)
    max_attempts: int = 1
    steps_are_parts: bool = False
    """Whether the ledger hears of every part as it ends, and not of every epoch."""


class Interrupt:
    """Why a study has to stop before its end: it was asked to, or the ledger could no longer be written."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.failure: Exception | None = None

    @contextmanager
    def on_failure(self) -> Iterator[None]:
        """Keep what a ledger raises: Tune makes text of it."""
        try:
            yield
        except (LedgerError, LeaseLostError) as error:
            self.failure = error
            raise


class Stateless:
    """Keeps out of Tune's snapshots, which nothing is ever restored from: the ledger is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class LedgerSearch(Stateless, Searcher):  # type: ignore[misc]
    """Give Tune the trials of each series in turn: those left RUNNING first, then new ones until its number is full.

    Where `may_begin` says no, nothing new is begun; what was begun still runs to its end. No more are in hand at once
    than there is `room` for.
    """

    def __init__(
        self, plan: Sequence[Series], may_begin: Callable[[], bool], room: Callable[[], int], interrupt: Interrupt
    ) -> None:
        super().__init__()
        self._plan = plan
        self._may_begin = may_begin
        self._room = room
        self._interrupt = interrupt

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return a Tune config with the job of the next trial; None while one in hand may yet come back; FINISHED."""
        with self._interrupt.on_failure():
            if sum(len(series.ledger.in_hand()) for series in self._plan) >= self._room():
                return None
            new = self._may_begin()
            for series in self._plan:
                row = series.ledger.next(series.trials if new else 0)
                if row is not None:
                    return {"job": series.job(row)}
        return None if any(series.ledger.in_hand() for series in self._plan) else str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the scheduler has told the ledger."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


class LedgerScheduler(Stateless, FIFOScheduler):  # type: ignore[misc]
    """Take every report to recorder and ledger, and stop what the ledger's pruner gives up."""

    def __init__(
        self,
        plan: Sequence[Series],
        recorder: Recorder,
        progress: Progress,
        interrupt: Interrupt,
        ended: Callable[[Series, Row], None],
    ) -> None:
        super().__init__()
        self._series = {series.kind: series for series in plan}
        self._recorder = recorder
        self._progress = progress
        self._interrupt = interrupt
        self._ended = ended

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Open the trial's run, or open it again."""
        with self._interrupt.on_failure():
            job, series = self._of(trial)
            self._recorder.begin(job.kind, series.ledger.row(job.number), job.settings)
            series.ledger.note_of(job.number, CHECKPOINTS, str(job.folder))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Write the record down; stop the trial where that was its last, or where it is given up."""
        with self._interrupt.on_failure():
            job, series = self._of(trial)
            record: Record = result["record"]
            self._recorder.log(job.kind, job.number, record)
            self._note(job, series.ledger, record)
            step = _step(series, record)
            if step is not None:
                series.ledger.report(job.number, step, record.part_qualities[series.goals[0]])
            if record.last:
                excesses = {name: record.metrics[name] - bound for name, bound in series.limits.items()}
                series.ledger.limit(job.number, excesses)
                values = [record.metrics[goal] for goal in series.goals]
                self._end(trial, "COMPLETE", {METRICS: dict(record.metrics)}, values)
            elif step is not None and series.ledger.should_prune(job.number, step):
                self._end(trial, "PRUNED", {METRICS: dict(record.metrics)})
            else:
                return str(TrialScheduler.CONTINUE)
            return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Fail a trial that returned before its last epoch."""
        with self._interrupt.on_failure():
            job, series = self._of(trial)
            if job.number in series.ledger.in_hand():
                self._end(trial, "FAIL", {REASON: "the trial returned before its last epoch"})

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Have a trial tried again that may do better in another worker; fail it, with the reason, otherwise."""
        with self._interrupt.on_failure():
            job, series = self._of(trial)
            found = examine(trial, job)
            row = series.ledger.row(job.number)
            crashes = [*row.notes.get(CRASHES, []), found.reason]
            if isinstance(found.error, FreshProcessError):
                series.ledger.release(job.number)
                return
            self._recorder.attach(job.kind, job.number, f"attempt-{job.attempt}.txt", found.text)
            if isinstance(found.error, HOPELESS):
                self._end(trial, "FAIL", {REASON: found.reason})
            elif found.lost and row.notes.get(LOST_AT, []).count(row.epochs) < MOST_LOSSES:
                series.ledger.release(job.number, lost=True)
                self._progress.crashed(job.kind, job.number, found.reason)
            elif len(crashes) < series.max_attempts:
                series.ledger.release(job.number, crash=found.reason)
                self._progress.crashed(job.kind, job.number, found.reason)
            else:
                self._end(trial, "FAIL", {REASON: found.reason, CRASHES: crashes})

    def _note(self, job: Job, ledger: Ledger, record: Record) -> None:
        spent = {SECONDS: record.seconds, GPU_SECONDS: record.metrics[GPU_SECONDS], EPOCHS: record.epoch}
        ledger.note_of(job.number, SPENT, spent)
        run_id = self._recorder.run_id(job.kind, job.number)
        if run_id is not None:
            ledger.note_of(job.number, MLFLOW_RUN, run_id)

    def _end(self, trial: Trial, state: State, notes: Mapping[str, Any], values: Sequence[float] = ()) -> None:
        job, series = self._of(trial)
        self._recorder.end(job.kind, job.number, state, notes.get(REASON, ""))
        row = series.ledger.end(job.number, state, values, **notes)
        self._progress.ended(job.kind, row)
        self._ended(series, row)

    def _of(self, trial: Trial) -> tuple[Job, Series]:
        job: Job = trial.config["job"]
        return job, self._series[job.kind]


class StopAll(Stateless, Stopper):  # type: ignore[misc]
    """Stop everything where it is, once asked to; the ledger keeps what runs as RUNNING."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether it was asked for."""
        return self._interrupt.asked.is_set()


def _step(series: Series, record: Record) -> int | None:
    """Which step of the ledger's a record is, if it is one."""
    if series.goals[0] not in record.part_qualities:
        return None
    if not series.steps_are_parts:
        return record.epoch
    return record.part if record.ends_part else None
