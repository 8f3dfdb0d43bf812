"""The toy study in a driver's process of its own, for the benchmarks that watch one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna

from tests.conftest import ROOT


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


def run_driver(out: Path, module: str, *arguments: object) -> None:
    """Run a driver to its end. Raises RuntimeError, with what it said, where that is not exit status 0."""
    with driver(out, module, *arguments) as process:
        process.wait()
    if process.returncode != 0:
        said = (out / "driver.log").read_text()
        raise RuntimeError(f"{module} must end with exit status 0, got {process.returncode}: {said}")


def toy_ledger(out: Path) -> optuna.Study:
    """The toy study's rows; made beforehand, they can be watched from the first one on."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{out}/ledger.db"
    return optuna.create_study(storage=storage, study_name="toy", direction="maximize", load_if_exists=True)


def trials_ended(study: optuna.Study) -> int:
    """How many trials have ended."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
