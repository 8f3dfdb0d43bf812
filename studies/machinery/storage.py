"""The database of ledgers: opened, made ready for readers, and read in bulk."""

import functools
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optuna.distributions import json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import or_, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hdml_core.config import ConfigError


class LedgerError(ConfigError):
    """A ledger that can't be opened, or that holds something else than was asked for."""


class Storage(RDBStorage):
    """Optuna's storage, which reads a study of 10,000 trials in a second where the original takes eight.

    The rows are those of the same tables; what takes the time there is an object for each of them.
    """

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        trials = models.TrialModel.__table__
        wanted = (
            trials.c.study_id == study_id,
            or_(trials.c.trial_id > trial_id_greater_than, trials.c.trial_id.in_(included_trial_ids)),
        )
        with self.engine.connect() as connection:
            # States first: what is read of a trial after it has ended is all there is of it.
            names = ("trial_id", "number", "state", "datetime_start", "datetime_complete")
            chosen = select(*(trials.c[name] for name in names)).where(*wanted).order_by(trials.c.trial_id)
            rows = connection.execute(chosen).all()

            def by_trial(model: Any, *names: str) -> dict[int, list[Any]]:
                """These columns of a table, behind the id of the trial, by that id, in the order of the table."""
                table = model.__table__
                columns = [table.c[name] for name in ("trial_id", *names)]
                of_trials = select(*columns).join(trials, trials.c.trial_id == table.c.trial_id).where(*wanted)
                found: dict[int, list[Any]] = defaultdict(list)
                for row in connection.execute(of_trials.order_by(*table.primary_key)):
                    found[row[0]].append(row)
                return found

            params = by_trial(models.TrialParamModel, "param_name", "param_value", "distribution_json")
            values = by_trial(models.TrialValueModel, "objective", "value", "value_type")
            reports = by_trial(
                models.TrialIntermediateValueModel, "step", "intermediate_value", "intermediate_value_type"
            )
            user = by_trial(models.TrialUserAttributeModel, "key", "value_json")
            system = by_trial(models.TrialSystemAttributeModel, "key", "value_json")
        to_value = models.TrialValueModel.stored_repr_to_value
        to_report = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
        return [
            FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=[to_value(value, kind) for _, _, value, kind in sorted(values[key])] if key in values else None,
                datetime_start=begun,
                datetime_complete=ended,
                params={name: _distribution(kind).to_external_repr(value) for _, name, value, kind in params[key]},
                distributions={name: _distribution(kind) for _, name, _, kind in params[key]},
                user_attrs={name: json.loads(value) for _, name, value in user[key]},
                system_attrs={name: json.loads(value) for _, name, value in system[key]},
                intermediate_values={step: to_report(value, kind) for _, step, value, kind in reports[key]},
                trial_id=key,
            )
            for key, number, state, begun, ended in rows
            if states is None or state in states
        ]


_distribution = functools.lru_cache(maxsize=1024)(json_to_distribution)


def open_storage(url: str) -> Storage:
    """Open a database of ledgers, making its schema where it has none.

    Raises LedgerError where the address is malformed or nobody answers there.
    """
    try:
        address = make_url(url)
        if address.get_backend_name() == "sqlite" and address.database:
            make_whole(Path(address.database), lambda aside: RDBStorage(aside).engine.dispose())
            _write_ahead(Path(address.database))
        patience = {"timeout": 60} if address.get_backend_name() == "sqlite" else {"connect_timeout": 10}
        return Storage(url, engine_kwargs={"connect_args": patience, "pool_pre_ping": True})
    # RuntimeError is Optuna's word for tables of another version of it; it names the way out.
    except (SQLAlchemyError, ImportError, OSError, sqlite3.Error, RuntimeError) as error:
        raise LedgerError(f"the ledger {_without_password(url)} can't be opened: {first_line(error)}") from error


def make_whole(path: Path, make: Callable[[str], object]) -> None:
    """Have a SQLite database made that is not there: under another name, so that it is whole once it has its own.

    `make` is given the address to make it at. What a process leaves that is killed meanwhile is in nobody's way, and
    of several that make it at once the first one's counts.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        aside = Path(folder) / path.name
        make(f"sqlite:///{aside}")
        with suppress(FileExistsError):
            path.hardlink_to(aside)


def first_line(error: BaseException) -> str:
    """What a database says, where Optuna wraps it too."""
    return str(error.__cause__ or error).splitlines()[0]


def _write_ahead(path: Path) -> None:
    """Let readers of a SQLite ledger, such as a dashboard, never keep the driver waiting."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url
