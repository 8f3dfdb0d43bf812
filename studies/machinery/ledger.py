"""The one truth about trials: which exist, with what parameters, and how they ended. An Optuna study, told no lies.

A row is RUNNING from the moment it is asked for until it ends COMPLETE, PRUNED or FAIL, once. Ending a row is the
last thing done about a trial: whatever a fault cut short before is done again when the row is adopted. Only drivers
write, each under its lease, and each write may be made twice: a database that goes away in the middle is waited for,
and the write is made again.
"""

import difflib
import functools
import json
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import InterfaceError, OperationalError

from hdml_core.config import Setting
from studies.machinery.lease import Lease
from studies.machinery.records import ARM, FINISHED, GPU_SECONDS, SECONDS, Direction, State
from studies.machinery.samplers import RETRY_OF, counted, exhausted, make_pruner, make_sampler, within_limits
from studies.machinery.space import Space, active, contains, from_json, suggest, widens
from studies.machinery.storage import LedgerError, Storage, first_line

optuna.logging.set_verbosity(optuna.logging.ERROR)

OUTAGE = 3600.0
"""Seconds for which a database that is gone is waited for, while the workers go on as far as they can."""

# Notes of a study.
TERMS, STUDY_ID, OPENINGS, PRICE = "terms", "id", "openings", "price_per_trial_hour"
# Notes of a row.
OWNER, ATTEMPTS, CRASHES, LOST_AT, REASON, METRICS, SPENT, MLFLOW_RUN, CHECKPOINTS = (
    "owner",
    "attempts",
    "crashes",
    "lost_at",
    "reason",
    "metrics",
    "spent",
    "mlflow_run",
    "checkpoints",
)
EPOCHS = "epochs"
"""In SPENT beside the costs: how many epochs were told."""

COMPARED = ("arms", "baseline", "goals", "limits", "folds", "seeds", "steps", "data")
"""Terms of a study, beside its settings and its space, that may not change once it was begun."""

WITHOUT_A_TRACE = ("data.resident",)
"""Settings that change no bit of a run, and so may change at any time."""


class Row(NamedTuple):
    """A trial as the ledger has it."""

    number: int
    params: dict[str, Setting]
    state: State
    values: tuple[float, ...]
    """What it reached of each goal, once COMPLETE; what it had last told of the first, once PRUNED."""
    reports: dict[int, float]
    """The first goal after each step: after each epoch, or of each part, by the pruner."""
    notes: dict[str, Any]
    began: datetime

    @property
    def value(self) -> float | None:
        """What it reached of the first goal."""
        return self.values[0] if self.values else None

    @property
    def seconds(self) -> float:
        """Work that went into it, in seconds, over all attempts that were not lost."""
        return float(self.notes.get(SPENT, {}).get(SECONDS, 0.0))

    @property
    def epochs(self) -> int:
        """Epochs that were told of it."""
        return int(self.notes.get(SPENT, {}).get(EPOCHS, 0))


P = ParamSpec("P")
R = TypeVar("R")


def patient(method: Callable[P, R]) -> Callable[P, R]:
    """Have a method of the ledger wait for a database that is gone, and begin anew when it is back."""

    @functools.wraps(method)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        deadline = time.monotonic() + OUTAGE
        told = False
        while True:
            try:
                return method(*args, **kwargs)
            except (OperationalError, InterfaceError, StorageInternalError) as error:
                if time.monotonic() > deadline:
                    raise LedgerError(f"the ledger was gone for {OUTAGE:.0f} s: {first_line(error)}") from error
                if not told:
                    print(f"the ledger does not answer, waiting for it: {first_line(error)}", file=sys.stderr)
                told = True
                time.sleep(1)

    return waiting


def studies(storage: Storage) -> list[str]:
    """The names of the studies that there are, their siblings such as NAME.baseline left out."""
    return sorted(name for name in optuna.get_all_study_names(storage) if "." not in name)


def existing(storage: Storage, name: str) -> "Ledger":
    """Open a study that has been run.

    Raises LedgerError, with the names that there are, where it has not.
    """
    known = studies(storage)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LedgerError(f"no study {name!r} in the ledger: it has [{', '.join(known)}]{hint}")
    return Ledger(storage, name, {})


def best_points(storage: Storage, name: str | None, space: Space, most: int = 4) -> list[dict[str, Setting]]:
    """The best points of another study that the space has, the best first: where a search may begin warm.

    Raises LedgerError where there is no such study, or none of its points lies in the space.
    """
    if name is None:
        return []
    other = existing(storage, name)
    points = [active(space, row.params) for row in other.ranked()]
    found = [point for point in points if contains(space, point)][:most]
    if not found:
        raise LedgerError(
            f"study {name!r} has no COMPLETE trial in this study's space [{', '.join(space)}] to start from"
        )
    return found


def spent(rows: Iterable[Row]) -> tuple[float, float]:
    """Seconds of work and seconds of GPUs that went into the trials."""
    notes = [row.notes.get(SPENT, {}) for row in rows]
    return sum(note.get(SECONDS, 0.0) for note in notes), sum(note.get(GPU_SECONDS, 0.0) for note in notes)


def set_aside(storage: Storage, name: str, aside: str) -> None:
    """Rename a study of the ledger, and its siblings with it."""
    for old in optuna.get_all_study_names(storage):
        if old == name or old.startswith(f"{name}."):
            optuna.copy_study(
                from_study_name=old,
                from_storage=storage,
                to_storage=storage,
                to_study_name=old.replace(name, aside, 1),
            )
            optuna.delete_study(study_name=old, storage=storage)


class Ledger:
    """One study's rows. Makes the study where there is none. Without a lease it is for reading."""

    def __init__(
        self,
        storage: Storage,
        name: str,
        space: Space,
        lease: Lease | None = None,
        *,
        directions: Sequence[Direction] = ("maximize",),
        sampler: str = "random",
        pruner: str = "none",
        steps: int = 1,
        seed: int = 0,
    ) -> None:
        """`steps` is how often a trial reports at most."""
        self.name = name
        self.space = space
        self._lease = lease
        self._storage = storage
        self._sampler = functools.partial(make_sampler, sampler, space, seed)
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=directions,
            pruner=make_pruner(pruner, steps),
            sampler=self._sampler(0),
            load_if_exists=True,
        )
        self._live: dict[int, optuna.Trial] = {}
        self._reported: dict[int, set[int]] = {}

    @property
    @patient
    def notes(self) -> dict[str, Any]:
        """What was noted of the study as a whole."""
        return self._study.user_attrs

    @patient
    def note(self, name: str, value: Any) -> None:
        """Note something of the study as a whole."""
        self._study.set_user_attr(name, value)

    @patient
    def note_of(self, number: int, name: str, value: Any) -> None:
        """Note something of a trial in hand, unless it is noted already."""
        trial = self._live[number]
        if trial.user_attrs.get(name) != value:
            trial.set_user_attr(name, value)

    def settle(self, terms: Mapping[str, Any], space: Space) -> None:
        """Note on what terms the study's trials stand side by side; a later driver may only widen the space.

        Raises LedgerError with the difference where the study was begun on other terms.
        """
        terms = json.loads(json.dumps(terms))
        begun = self.notes.get(TERMS)
        if begun is not None:
            changes = _changes(begun, terms)
            if not widens(space, from_json(begun["space"])):
                changes.append("the space, which is not a widening of the old one")
            if changes:
                raise LedgerError(
                    f"study {self.name!r} was begun on other terms: {'; '.join(changes)}. "
                    "Give --name OTHER to keep both, or --fresh to put the old study aside"
                )
        self.note(TERMS, terms)

    def identity(self) -> str:
        """What tells this study from all others, also of its name, wherever it is recorded."""
        if STUDY_ID not in self.notes:
            self.note(STUDY_ID, uuid.uuid4().hex)
        return str(self.notes[STUDY_ID])

    @patient
    def enqueue(self, points: Iterable[Mapping[str, Setting]]) -> None:
        """Have these points tried first; those that are in the ledger already are not tried again."""
        for point in points:
            self._study.enqueue_trial(dict(point), skip_if_exists=True)

    @patient
    def enqueue_failed(self) -> int:
        """Have the trials tried again that FAILed for want of a living worker; return how many.

        They get numbers of their own, and the old ones do not count any longer. A trial whose own doing it was, such
        as a loss that is not finite, would only FAIL again.
        """
        again = [trial for trial in self._counted() if trial.state == TrialState.FAIL and CRASHES in trial.user_attrs]
        for trial in again:
            self._study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})
        return len(again)

    def rows(self) -> list[Row]:
        """All trials that were ever begun, by number."""
        return [_row(trial) for trial in self._begun()]

    def row(self, number: int) -> Row:
        """One trial."""
        return _row(self._trials()[number])

    def is_done(self, trials: int) -> bool:
        """Whether so many trials were begun and all have ended, or there is nothing left to begin."""
        begun = self._counted()
        full = len(begun) >= trials or exhausted(self._study.sampler, self._study)
        return full and all(trial.state.is_finished() for trial in begun)

    def best(self) -> Row:
        """The finished trial with the best value; of several goals, the best by the first of the Pareto front.

        Raises LedgerError where none is COMPLETE within the limits.
        """
        front = self.front()
        if not front:
            raise LedgerError(
                f"study {self.name!r} has no COMPLETE trial within its limits yet: run it further, or raise a limit"
            )
        return min(front, key=self._order)

    def ranked(self) -> list[Row]:
        """The COMPLETE trials within their limits, the best by the first goal first."""
        complete = [t for t in self._trials() if t.state == TrialState.COMPLETE and within_limits(t)]
        return sorted(map(_row, complete), key=self._order)

    def best_of_arms(self) -> dict[str, Row]:
        """The finished trial with the best value of the first goal, of each arm that has one."""
        best: dict[str, Row] = {}
        for row in self.ranked():
            best.setdefault(str(row.params[ARM]), row)
        return best

    def _order(self, row: Row) -> tuple[float, int]:
        sign = -1 if self._study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
        return sign * row.values[0], row.number

    @patient
    def front(self) -> list[Row]:
        """The finished trials that no other is better than in every goal, those above a limit left out."""
        complete = [trial for trial in self._trials() if trial.state == TrialState.COMPLETE]
        if not any(within_limits(trial) for trial in complete):
            return []
        return [_row(trial) for trial in self._study.best_trials]

    @patient
    def next(self, trials: int) -> Row | None:
        """Take a trial in hand: one that nobody has and that is RUNNING, else a new one; None at `trials`."""
        assert self._lease is not None  # who only reads takes none
        with self._lease.turn():
            living = self._lease.others()
            begun = self._begun()
            left = [
                trial
                for trial in begun
                if trial.state == TrialState.RUNNING
                and trial.number not in self._live
                and trial.user_attrs.get(OWNER) not in living
            ]
            self._study.sampler = self._sampler(left[0].number if left else len(begun))
            if left:
                trial = optuna.Trial(self._study, left[0]._trial_id)
            elif len(self._counted()) < trials and not exhausted(self._study.sampler, self._study):
                trial = self._study.ask()
            else:
                return None
            trial.set_user_attr(OWNER, self._lease.token)
            suggest(trial, self.space)  # which arm's turn it is, the next driver must see
        trial.set_user_attr(ATTEMPTS, trial.user_attrs.get(ATTEMPTS, 0) + 1)
        # In hand last of all: what a database that goes away cuts short before is taken up again.
        row = _row(self._storage.get_trial(trial._trial_id))
        self._live[trial.number], self._reported[trial.number] = trial, set(row.reports)
        return row

    def release(self, number: int, crash: str | None = None, lost: bool = False) -> None:
        """Let go of a trial that is to be taken in hand again.

        A crash is noted with its reason, the loss of a machine with the epochs that had been told then.
        """
        row = self.row(number)
        if crash is not None:
            self.note_of(number, CRASHES, [*row.notes.get(CRASHES, []), crash])
        if lost:
            self.note_of(number, LOST_AT, [*row.notes.get(LOST_AT, []), row.epochs])
        del self._live[number], self._reported[number]

    @patient
    def report(self, number: int, step: int, value: float) -> None:
        """Write down the goal after a step; each step is taken once. Of several goals Optuna keeps no reports."""
        if len(self._study.directions) == 1 and step not in self._reported[number]:
            self._live[number].report(value, step)
            self._reported[number].add(step)

    @patient
    def should_prune(self, number: int, step: int) -> bool:
        """Whether the pruner gives the trial up at this step; steps before its last reported one are past."""
        reported = self._reported[number]
        return bool(reported) and step >= max(reported) and self._live[number].should_prune()

    @patient
    def end(self, number: int, state: State, values: Sequence[float] = (), **notes: Any) -> Row:
        """End a trial as COMPLETE with its values, as PRUNED, or as FAIL."""
        trial = self._live[number]
        if self._held(number).state not in FINISHED:
            for name, noted in notes.items():
                trial.set_user_attr(name, noted)
            self._study.tell(trial, list(values) or None, TrialState[state], skip_if_finished=True)
        ended = self._held(number)
        del self._live[number], self._reported[number]
        return ended

    def in_hand(self) -> Collection[int]:
        """The trials that were taken by this driver and have not ended."""
        return self._live.keys()

    @patient
    def limit(self, number: int, excesses: Mapping[str, float]) -> None:
        """Note by how much a trial is above each limit; at most 0 is within it."""
        for name, excess in excesses.items():
            self._live[number].set_constraint(name, excess)

    def _held(self, number: int) -> Row:
        return _row(self._storage.get_trial(self._live[number]._trial_id))

    def _begun(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.state != TrialState.WAITING]

    def _counted(self) -> list[FrozenTrial]:
        """The trials that count toward the budget and were begun."""
        return [trial for trial in counted(self._trials()) if trial.state != TrialState.WAITING]

    @patient
    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def _changes(begun: Mapping[str, Any], terms: Mapping[str, Any]) -> list[str]:
    """What makes trials incomparable, line by line; the question's wording does not."""
    old, new = ({**of["settings"], **{name: of.get(name) or None for name in COMPARED}} for of in (begun, terms))
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name) and name not in WITHOUT_A_TRACE
    ]


def _row(trial: FrozenTrial) -> Row:
    assert trial.datetime_start is not None  # only a WAITING trial has none
    return Row(
        trial.number,
        dict(trial.params),
        cast(State, trial.state.name),
        tuple(trial.values or ()),
        dict(trial.intermediate_values),
        dict(trial.user_attrs),
        trial.datetime_start,
    )
