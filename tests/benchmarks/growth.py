"""What trials leave behind in the driver: its memory and the time of a trial, late in a long study and early in it."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path

import optuna
import psutil

from tests.benchmarks import Row, start_driver


def run(quick: bool) -> list[Row]:
    """Run a study of toys, and set its last tenth beside its first."""
    trials = 30 if quick else 1000
    tenth = trials // 10
    with tempfile.TemporaryDirectory(prefix="growth-") as out:
        study = optuna.create_study(storage=f"sqlite:///{out}/ledger.db", study_name="toy", direction="maximize")
        memory = watch(study, Path(out), trials)
        ends = sorted(row.datetime_complete for row in study.get_trials() if row.datetime_complete is not None)
    early, late = ((of[-1] - of[0]).total_seconds() / (tenth - 1) for of in (ends[:tenth], ends[-tenth:]))
    held = memory[min(ended for ended in memory if ended >= tenth)]
    return [
        Row(f"driver's memory after {trials} trials", memory[max(memory)], f"after {tenth}", held, 1, "MB"),
        Row(f"a trial, over the last {tenth} of {trials}", late, f"over the first {tenth}", early, 1),
    ]


def watch(study: optuna.Study, out: Path, trials: int) -> dict[int, float]:
    """Run the study to its end; return the driver's resident memory in MB, by the number of trials that had ended."""
    driver = start_driver(out, "tests.machinery.toy_study", out, trials)
    memory: dict[int, float] = {}
    while driver.poll() is None:
        ended = sum(row.state.is_finished() for row in study.get_trials(deepcopy=False))
        with suppress(psutil.NoSuchProcess):
            memory.setdefault(ended, driver.memory_info().rss / 2**20)
        time.sleep(0.2)
    if driver.returncode != 0:
        words = (out / "driver.log").read_text()
        raise RuntimeError(f"the study must end with exit status 0, got {driver.returncode}: {words}")
    return memory
