"""Benchmarks: what our pieces cost, or lose, beside a peer or a physical floor, measured in the same run.

A benchmark is a module here with `run(quick)` that returns a list of Rows or Counts; nothing else has to be done.
Machines are noisy and of all kinds, so what counts is the ratio of medians, never a time by itself.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from tests.conftest import ROOT


class Row(NamedTuple):
    """Our figure and the peer's in the same unit; of times, the medians over `repeats` alternating runs."""

    what: str
    ours: float
    peer_name: str
    peer: float
    repeats: int
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """Ours over the peer's: below 1 is faster, or less."""
        return self.ours / self.peer

    def __str__(self) -> str:
        return f"{self.what:50} {self.ours:9.4g} {self.unit:2} {self.ratio:7.3f} x {self.peer_name}"

    def record(self) -> dict[str, Any]:
        """The row in plain types."""
        return self._asdict() | {"ratio": self.ratio}


class Count(NamedTuple):
    """How often something happened to us and to the peer, over the same `rounds`."""

    what: str
    ours: int
    peer_name: str
    peer: int
    rounds: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.what:50} {self.ours:9} {self.peer:10} of {self.peer_name}{self.note and f': {self.note}'}"

    def record(self) -> dict[str, Any]:
        """The count in plain types."""
        return self._asdict()


def compare(what: str, ours: Callable[[], object], peer_name: str, peer: Callable[[], object], repeats: int) -> Row:
    """Time both in turn, after one unmeasured run of each."""
    times: dict[Callable[[], object], list[float]] = {ours: [], peer: []}
    for repeat in range(repeats + 1):
        for work, taken in times.items():
            begin = time.perf_counter()
            work()
            if repeat:
                taken.append(time.perf_counter() - begin)
    return Row(what, statistics.median(times[ours]), peer_name, statistics.median(times[peer]), repeats)


@contextmanager
def driver(out: Path, module: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a study's driver where no one else can reach its Ray, and end what is left of both at the end.

    What it says goes to `driver.log` in its folder.
    """
    command = [sys.executable, str(ROOT / "tests/isolated.py"), sys.executable, "-m", module, *map(str, arguments)]
    with (
        (out / "driver.log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Ray's agents outlive a driver by half a minute


def toy_ledger(out: Path) -> optuna.Study:
    """The toy study's rows; made beforehand, they can be watched from the first one on."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{out}/ledger.db"
    return optuna.create_study(storage=storage, study_name="toy", direction="maximize", load_if_exists=True)


def trials_ended(study: optuna.Study) -> int:
    """How many trials have ended."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
