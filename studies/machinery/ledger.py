"""The one truth about trials: which exist, with what parameters, and how they ended. An Optuna study, told no lies.

A row is RUNNING from the moment it is asked for until it ends COMPLETE, PRUNED or FAIL, once. Ending a row is the
last thing done about a trial: whatever a fault cut short before is done again when the row is adopted.
Only the driver writes.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hdml_core.config import ConfigError, Setting
from studies.machinery.records import Direction, State
from studies.machinery.space import Space, from_json, suggest, widens

optuna.logging.set_verbosity(optuna.logging.ERROR)


class LedgerError(ConfigError):
    """A ledger that can't be opened, or that holds something else than was asked for."""


class Row(NamedTuple):
    """A trial as the ledger has it."""

    number: int
    params: dict[str, Setting]
    state: State
    value: float | None
    reports: dict[int, float]
    """The goal after each epoch."""
    notes: dict[str, Any]
    began: datetime
    seconds: float


def tpe(seed: int) -> BaseSampler:
    """Tree-structured Parzen estimator over all parameters jointly; running trials count as bad ones."""
    return TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True)


SAMPLERS = {"tpe": tpe, "random": RandomSampler}
PRUNERS: Mapping[str, BasePruner] = {
    "none": NopPruner(),
    "median": MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    "halving": SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
}


COMPARED = ("baseline", "goal", "direction", "data")
"""Terms of a study, beside its settings and its space, that may not change once it was begun."""


def open_storage(url: str) -> RDBStorage:
    """Open a database of ledgers, making its schema where it has none.

    Raises LedgerError where the address is malformed or nobody answers there.
    """
    try:
        address = make_url(url)
        if address.get_backend_name() == "sqlite" and address.database:
            _write_ahead(Path(address.database))
        patience = {"timeout": 60} if address.get_backend_name() == "sqlite" else {"connect_timeout": 10}
        return RDBStorage(url, engine_kwargs={"connect_args": patience})
    except (SQLAlchemyError, ImportError, OSError, sqlite3.Error) as error:
        reason = str(error).splitlines()[0]
        raise LedgerError(f"the ledger {_without_password(url)} can't be opened: {reason}") from error


def existing(storage: RDBStorage, name: str) -> "Ledger":
    """Open a study that has been run.

    Raises LedgerError, with the names that there are, where it has not.
    """
    names = [known for known in optuna.get_all_study_names(storage) if "." not in known]
    if name not in names:
        raise LedgerError(f"no study {name!r} in the ledger: it has [{', '.join(sorted(names))}]")
    return Ledger(storage, name, {})


def set_aside(storage: RDBStorage, name: str, aside: str) -> None:
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
    """One study's rows. Makes the study where there is none."""

    def __init__(
        self,
        storage: RDBStorage,
        name: str,
        space: Space,
        *,
        direction: Direction = "maximize",
        sampler: str = "random",
        pruner: str = "none",
        seed: int = 0,
    ) -> None:
        self.name = name
        self.space = space
        self._sampler = SAMPLERS[sampler]
        self._seed = seed
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction=direction,
            pruner=PRUNERS[pruner],
            sampler=self._sampler(seed),
            load_if_exists=True,
        )
        self._live: dict[int, optuna.Trial] = {}

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted of the study as a whole."""
        return self._study.user_attrs

    def note(self, name: str, value: Any) -> None:
        """Note something of the study as a whole."""
        self._study.set_user_attr(name, value)

    def note_of(self, number: int, name: str, value: Any) -> None:
        """Note something of a trial in hand."""
        self._live[number].set_user_attr(name, value)

    def settle(self, terms: Mapping[str, Any], space: Space) -> None:
        """Note on what terms the study's trials stand side by side; a later driver may only widen the space.

        Raises LedgerError with the difference where the study was begun on other terms.
        """
        terms = json.loads(json.dumps(terms))
        begun = self.notes.get("terms")
        if begun is not None:
            changes = _changes(begun, terms)
            if not widens(space, from_json(begun["space"])):
                changes.append("the space, which is not a widening of the old one")
            if changes:
                raise LedgerError(
                    f"study {self.name!r} was begun on other terms: {'; '.join(changes)}. "
                    "Give --name OTHER to keep both, or --fresh to put the old study aside"
                )
        self.note("terms", terms)

    def enqueue(self, points: Iterable[Mapping[str, Setting]]) -> None:
        """Have these points tried first; those that are in the ledger already are not tried again."""
        for point in points:
            self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def rows(self) -> list[Row]:
        """All trials that were ever begun, by number."""
        return [_row(trial) for trial in self._trials() if trial.state != TrialState.WAITING]

    def row(self, number: int) -> Row:
        """One trial."""
        return _row(self._trials()[number])

    def best(self) -> Row:
        """The finished trial with the best value.

        Raises LedgerError where none is COMPLETE.
        """
        if not any(trial.state == TrialState.COMPLETE for trial in self._trials()):
            raise LedgerError(f"study {self.name!r} has no COMPLETE trial yet: run it further")
        return _row(self._study.best_trial)

    def next(self, trials: int) -> Row | None:
        """Take a trial in hand: one that a driver before this one left RUNNING, else a new one; None at `trials`."""
        begun = [trial for trial in self._trials() if trial.state != TrialState.WAITING]
        left = [t for t in begun if t.state == TrialState.RUNNING and t.number not in self._live]
        # A sampler of its own for every number: a study that was interrupted draws what it would have drawn.
        entropy = np.random.SeedSequence([self._seed, left[0].number if left else len(begun)])
        self._study.sampler = self._sampler(int(entropy.generate_state(1)[0]))
        if left:
            trial = optuna.Trial(self._study, left[0]._trial_id)
        elif len(begun) < trials:
            trial = self._study.ask()
        else:
            return None
        self._live[trial.number] = trial
        suggest(trial, self.space)
        trial.set_user_attr("attempts", trial.user_attrs.get("attempts", 0) + 1)
        return self.row(trial.number)

    def report(self, number: int, step: int, value: float) -> None:
        """Write down the goal after a step; each step is taken once."""
        if step not in self.row(number).reports:
            self._live[number].report(value, step)

    def should_prune(self, number: int, step: int) -> bool:
        """Whether the pruner gives the trial up at this step; steps before its last reported one are past."""
        return step >= max(self.row(number).reports, default=step) and self._live[number].should_prune()

    def end(self, number: int, state: State, value: float | None = None, **notes: Any) -> Row:
        """End a trial as COMPLETE with its value, as PRUNED, or as FAIL."""
        trial = self._live[number]
        for name, noted in notes.items():
            trial.set_user_attr(name, noted)
        ended = self._study.tell(trial, value, TrialState[state])
        del self._live[number]
        return _row(ended)

    def in_hand(self, number: int) -> bool:
        """Whether the trial was taken by this driver and has not ended."""
        return number in self._live

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def _changes(begun: Mapping[str, Any], terms: Mapping[str, Any]) -> list[str]:
    """What makes trials incomparable, line by line; the question's wording does not."""
    old = {**begun["settings"], **{name: begun[name] for name in COMPARED}}
    new = {**terms["settings"], **{name: terms[name] for name in COMPARED}}
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in old | new if old.get(name) != new.get(name)
    ]


def _row(trial: FrozenTrial) -> Row:
    assert trial.datetime_start is not None  # only a WAITING trial has none
    duration = trial.duration
    return Row(
        trial.number,
        dict(trial.params),
        cast(State, trial.state.name),
        trial.value,
        dict(trial.intermediate_values),
        dict(trial.user_attrs),
        trial.datetime_start,
        duration.total_seconds() if duration else 0.0,
    )


def _write_ahead(path: Path) -> None:
    """Let readers of a SQLite ledger, such as a dashboard, never keep the driver waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url
