"""What trials leave behind in the driver: its memory and the time of a trial, late in a long study and early in it."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.benchmarks import Row
from tests.benchmarks._toys import driver, toy_ledger, trials_ended


class Look(NamedTuple):
    """What a driver holds, in MB, and what it has taken so far, in seconds."""

    ended: int
    memory: float
    clock: float
    processor: float


def run(quick: bool) -> list[Row]:
    """Run a study of toys, and set its last tenth beside its first."""
    trials = 40 if quick else 1000
    tenth = trials // 10
    with tempfile.TemporaryDirectory(prefix="growth-") as out:
        looks = watch(Path(out), trials)
    first, early, before_last, last = (
        next(look for look in looks if look.ended >= count) for count in (1, tenth, trials - tenth, trials)
    )

    def compared(what: str, name: str) -> Row:
        late, soon = (
            (getattr(end, name) - getattr(begin, name)) / (end.ended - begin.ended)
            for begin, end in ((before_last, last), (first, early))
        )
        return Row(f"{what} per trial, last {tenth} of {trials}", late, f"of the first {tenth}", soon, 1)

    return [
        Row(f"driver's memory after {trials} trials", last.memory, f"after {tenth}", early.memory, 1, "MB"),
        compared("time", "clock"),
        compared("driver's processor time", "processor"),
    ]


def watch(out: Path, trials: int) -> list[Look]:
    """Run the study to its end, looking at its driver all the while."""
    study, looks = toy_ledger(out), []
    with driver(out, "tests.machinery.toy_study", out, trials) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            taken = watched.cpu_times()
            memory = watched.memory_info().rss / 2**20
            looks.append(Look(trials_ended(study), memory, time.monotonic(), taken.user + taken.system))
            time.sleep(0.1)
    if process.returncode != 0:
        words = (out / "driver.log").read_text()
        raise RuntimeError(f"the study must end with exit status 0, got {process.returncode}: {words}")
    return looks
