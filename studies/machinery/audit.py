"""Who looked at a study's test classes, when, and at what: a row for every opening, in the ledger and in MLflow.

A row is there before anything is looked at; an opening that was broken off has one without an end.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from hdml_core.config import Settings
from studies.machinery.ledger import OPENINGS, TERMS, Ledger
from studies.machinery.records import Kind
from studies.machinery.tracking import Recorder

SOURCES = ("hdml_core", "studies/machinery")
"""What a measurement hangs on of the code; what a study file says is in its terms."""
NOT_TAGGED = ("number", "kind", "finished")
"""What an opening's label says already, and what is not known when it begins."""


class Opening(NamedTuple):
    """One look at the test classes."""

    number: int
    """Counted from 1. That of the floor, by which nothing is chosen, is 0."""
    kind: Kind
    """`confirm`; `paper`, where the test classes chose an epoch too; `floor`."""
    frozen: str
    """SHA-256 of what was frozen: the study's space, data and settings, the code, and the settings compared."""
    code: str
    """SHA-256 of the code alone."""
    commit: str
    begun: str
    by: str
    best: str = ""
    """The trial that was opened for, and what it was compared with."""
    against: str = ""
    seeds: int = 0
    finished: str | None = None

    @property
    def label(self) -> str:
        """Its name among those of the study: in the ledger, in MLflow and on disk."""
        return f"{self.kind}-{self.number}"

    def tags(self) -> dict[str, str]:
        """What is known of it beforehand, for runs of MLflow."""
        others = {name: str(value) for name, value in self._asdict().items() if name not in NOT_TAGGED}
        return {"opening": self.label} | others


def openings(ledger: Ledger) -> list[Opening]:
    """All looks at the study's test classes, by number."""
    return [Opening(**row) for row in ledger.notes.get(OPENINGS, [])]


def new_opening(
    ledger: Ledger,
    number: int,
    kind: Kind,
    commit: str,
    arms: Mapping[str, Settings] | None = None,
    best: str = "",
    against: str = "",
    seeds: int = 0,
) -> Opening:
    """Return an opening of the study as it is now, by this user; nothing is written yet."""
    code = code_digest(Path(__file__).parents[2])
    terms = {name: term for name, term in ledger.notes[TERMS].items() if name != "question"}
    frozen = json.dumps([terms, code, arms], sort_keys=True)
    return Opening(
        number,
        kind,
        hashlib.sha256(frozen.encode()).hexdigest(),
        code,
        commit,
        now(),
        f"{psutil.Process().username()}@{platform.node()}",
        best,
        against,
        seeds,
    )


@contextmanager
def opened(ledger: Ledger, recorder: Recorder, opening: Opening) -> Iterator[None]:
    """Leave the opening's row, have the test classes looked at, and say in the row that it is over."""
    _write(ledger, opening)
    recorder.note(f"{opening.label}-opened", opening.tags(), {})
    yield
    _write(ledger, opening._replace(finished=now()))


def floor_opened(ledgers: Mapping[Kind, Ledger], recorder: Recorder, commit: str) -> AbstractContextManager[None]:
    """Leave the row of a study's floor, once, where it has one."""
    if "floor" not in ledgers:
        return nullcontext()
    ledger = ledgers["search"]
    begun = [opening for opening in openings(ledger) if opening.kind == "floor"]
    opening = begun[0] if begun else new_opening(ledger, 0, "floor", commit)
    return nullcontext() if opening.finished else opened(ledger, recorder, opening)


def code_digest(root: Path) -> str:
    """SHA-256 of the SOURCES under `root`: of every module's path and content, by path."""
    digest = hashlib.sha256()
    for path in sorted(path for source in SOURCES for path in (root / source).rglob("*.py")):
        digest.update(repr((path.relative_to(root).as_posix(), path.read_bytes())).encode())
    return digest.hexdigest()


def now() -> str:
    """The time, to the second, where this process is."""
    return datetime.now().isoformat(timespec="seconds")


def _write(ledger: Ledger, opening: Opening) -> None:
    others = [other for other in openings(ledger) if other.number != opening.number]
    ledger.note(OPENINGS, [row._asdict() for row in sorted([*others, opening])])
