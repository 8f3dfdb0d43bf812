"""What trials leave behind in the driver: its memory and the time of a trial, late in a long study and early in it."""

import tempfile
import time
from pathlib import Path

import optuna
import psutil

from tests.benchmarks import Row, driver, toy_ledger, trials_ended


def run(quick: bool) -> list[Row]:
    """Run a study of toys, and set its last tenth beside its first."""
    trials = 30 if quick else 1000
    tenth = trials // 10
    with tempfile.TemporaryDirectory(prefix="growth-") as out:
        study = toy_ledger(Path(out))
        memory = watch(study, Path(out), trials)
        ends = sorted(row.datetime_complete for row in study.get_trials() if row.datetime_complete is not None)
    early, late = ((of[-1] - of[0]).total_seconds() / (tenth - 1) for of in (ends[:tenth], ends[-tenth:]))
    held = memory[min(count for count in memory if count >= tenth)]
    return [
        Row(f"driver's memory after {trials} trials", memory[max(memory)], f"after {tenth}", held, 1, "MB"),
        Row(f"a trial, over the last {tenth} of {trials}", late, f"over the first {tenth}", early, 1),
    ]


def watch(study: optuna.Study, out: Path, trials: int) -> dict[int, float]:
    """Run the study to its end; return the driver's resident memory in MB, by the number of trials that had ended."""
    memory: dict[int, float] = {}
    with driver(out, "tests.machinery.toy_study", out, trials) as process:
        while process.poll() is None:
            memory.setdefault(trials_ended(study), psutil.Process(process.pid).memory_info().rss / 2**20)
            time.sleep(0.2)
    if process.returncode != 0:
        words = (out / "driver.log").read_text()
        raise RuntimeError(f"the study must end with exit status 0, got {process.returncode}: {words}")
    return memory
