"""What a study keeps whose driver and workers are killed: this engine, and Ray Tune by its own documentation.

The peer is a `Tuner` of a function with checkpoints, with `OptunaSearch` on an `RDBStorage`, `MedianStoppingRule`,
`FailureConfig` and `MLflowLoggerCallback`, and `Tuner.restore` wherever `Tuner.can_restore`. Where the documentation
leaves a choice the kinder one is taken: snapshots every second instead of ten (`TUNE_GLOBAL_CHECKPOINT_S`) and after
every second checkpoint of a trial (`num_to_keep`), and `resume_errored`, since `restart_errored` gives a trial an id
that `OptunaSearch` does not know.

Both sides run the same toys and are struck at the same moments of their ledgers. Then the same command is given again,
until the study ends, or has crashed three times by itself. What is left in the databases of Optuna and MLflow is
counted alike for both.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import mlflow
import optuna
import psutil
import ray
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch

from studies.machinery.records import TAG_TRIAL, trial_id
from tests.benchmarks import Count
from tests.benchmarks._toys import driver, toy_ledger, trials_ended
from tests.machinery.toy_study import run_toy
from tests.machinery.toys import EPOCHS, GOAL, value

DIVERGES_ABOVE = 0.8
PARALLEL, ATTEMPTS = 2, 3
LIMIT = 180
"""Seconds after which a driver that neither ends nor crashes is given up."""
CRASHES = "restarts that crashed"


class Blow(NamedTuple):
    """A kill -9 of the driver or of a worker, after so many trials have ended."""

    after: int
    victim: str


class Recorded(NamedTuple):
    """A run of MLflow: its status, and the epochs that it has of a series."""

    status: str
    epochs: list[int]


def engine(out: Path, trials: int, pause: float) -> None:
    """Run or resume the study on this engine."""
    of_study = {"pruner": "median", "parallel": PARALLEL, "max_attempts": ATTEMPTS}
    run_toy(out, trials, pause=pause, diverges_above=DIVERGES_ABOVE, **of_study)


def ray_tune(out: Path, trials: int, pause: float) -> None:
    """Run or restore the study on Ray Tune."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1"
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    if tune.Tuner.can_restore(out / "toy"):
        tuner = tune.Tuner.restore(str(out / "toy"), climb, resume_unfinished=True, resume_errored=True)
    else:
        storage = optuna.storages.RDBStorage(f"sqlite:///{out}/ledger.db")
        tuner = tune.Tuner(
            climb,
            param_space={"x": tune.uniform(0.0, 1.0), "pause": pause},
            tune_config=tune.TuneConfig(
                metric=GOAL,
                mode="max",
                search_alg=OptunaSearch(study_name="toy", storage=storage, seed=1),
                scheduler=MedianStoppingRule("training_iteration", grace_period=2, min_samples_required=4),
                num_samples=trials,
                max_concurrent_trials=PARALLEL,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="toy",
                storage_path=str(out),
                failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
                callbacks=[MLflowLoggerCallback(f"sqlite:///{out}/mlflow.db", experiment_name="toy")],
            ),
        )
    tuner.fit()


def climb(config: Mapping[str, float]) -> None:
    """The toy as a function for Ray Tune."""
    done = 0
    if (checkpoint := tune.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            done = json.loads(Path(folder, "epoch.json").read_text())
    for epoch in range(done + 1, EPOCHS + 1):
        time.sleep(config["pause"])
        if config["x"] > DIVERGES_ABOVE:
            raise FloatingPointError(f"j_m is nan at epoch {epoch}")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "epoch.json").write_text(json.dumps(epoch))
            told = {"train/j_m": 1.0 / epoch, GOAL: value(config["x"], epoch)}
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))


SIDES: Mapping[str, Callable[[Path, int, float], None]] = {"engine": engine, "ray_tune": ray_tune}


def run(quick: bool) -> list[Count]:
    """Strike both sides at the same moments, some epochs later in each round, and add up what is left behind."""
    trials, pause, blows, epochs_late, patience = (
        (4, 0.2, [Blow(2, "driver")], [0.0], 1)
        if quick
        else (12, 0.5, [Blow(2, "driver"), Blow(5, "worker"), Blow(8, "driver")], [0.0, 1.5, 3.0], 3)
    )
    found: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
    last_words: Counter[str] = Counter()
    for late in epochs_late:
        for side in SIDES:
            with tempfile.TemporaryDirectory(prefix=f"restore-{side}-", ignore_cleanup_errors=True) as folder:
                crashes = endure(side, Path(folder), trials, pause, blows, late * pause, patience)
                found[side].update(left_behind(Path(folder), trials))
            found[side].update({CRASHES: len(crashes), "studies that never ended": int(len(crashes) == patience)})
            last_words.update(f"{side}: {words}" for words in crashes)
    note = "; ".join(f"{times} x {words}" for words, times in last_words.most_common())
    return [
        Count(what, found["engine"][what], "Ray Tune", theirs, len(epochs_late), note if what == CRASHES else "")
        for what, theirs in found["ray_tune"].items()
    ]


def endure(
    side: str, out: Path, trials: int, pause: float, blows: Sequence[Blow], late: float, patience: int
) -> list[str]:
    """Give the same command until the study ends, or has crashed `patience` times; a blow falls `late` seconds late.

    Returns the last words of every driver that died and was not struck.
    """
    study = toy_ledger(out)
    coming = deque(blows)
    crashes: list[str] = []
    while len(crashes) < patience:
        with driver(out, __name__, side, out, trials, pause) as process:
            deadline = time.monotonic() + LIMIT
            while process.poll() is None:
                time.sleep(0.05)
                if coming and trials_ended(study) >= coming[0].after:
                    time.sleep(late)
                    if strike(process.pid, coming[0].victim):
                        coming.popleft()
                if time.monotonic() > deadline:
                    process.send_signal(signal.SIGABRT)
        if process.returncode == 0:
            break
        if process.returncode != -signal.SIGKILL:
            words = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", (out / "driver.log").read_text(), re.MULTILINE)
            crashes.append(words[-1] if words else f"exit status {process.returncode}")
    return crashes


def strike(driver_id: int, victim: str) -> bool:
    """Kill a driver, or its worker that is in the middle of a trial; False where there is none."""
    if victim == "driver":
        os.kill(driver_id, signal.SIGKILL)
        return True
    for process in psutil.Process(driver_id).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if re.match(r"ray::\w+\.train", " ".join(process.cmdline())):
                process.kill()
                return True
    return False


def left_behind(out: Path, trials: int) -> dict[str, int]:
    """Count what the databases of Optuna and MLflow say of a study that is over."""
    rows = toy_ledger(out).get_trials()
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    runs = {run: client.get_metric_history(run.info.run_id, "train/j_m") for run in found if "x" in run.data.params}
    steps_per_epoch = min((point.step for series in runs.values() for point in series), default=1)
    # Its x is all that ties a run of Ray Tune's to a row.
    rows_of: dict[float, list[FrozenTrial]] = defaultdict(list)
    runs_of: dict[float, list[Recorded]] = defaultdict(list)
    for row in rows:
        rows_of[round(row.params.get("x", -1.0), 9)].append(row)
    for run, series in runs.items():
        epochs = [point.step // steps_per_epoch for point in series]
        runs_of[round(float(run.data.params["x"]), 9)].append(Recorded(run.info.status, epochs))
    faults = [faults_of(rows_of[x], runs_of[x]) for x in rows_of.keys() | runs_of.keys()]
    numbers = {run.data.tags.get(TAG_TRIAL) for run in runs}
    return {
        "trials that there should be": trials,
        "trials ended once, and told so alike": sum(not any(of.values()) for of in faults),
        "trials lost": max(0, trials - sum(any(row.state.is_finished() for row in of) for of in rows_of.values())),
        **{what: sum(of[what] for of in faults) for what in faults[0]},
        "rows whose number no run bears": sum(trial_id(row.number) not in numbers for row in rows),
    }


def faults_of(rows: Sequence[FrozenTrial], runs: Sequence[Recorded]) -> dict[str, int]:
    """Count what is wrong with what was written down of one trial."""
    ended = [row for row in rows if row.state.is_finished()]
    closed = [run for run in runs if run.status != "RUNNING"]
    to_the_end = any(row.state == TrialState.COMPLETE and is_true(row) for row in ended)
    lasts = [EPOCHS if to_the_end else max(run.epochs, default=0) for run in closed]
    return {
        "trials ended twice": int(len(ended) > 1 or sum(EPOCHS in run.epochs for run in runs) > 1),
        "rows left RUNNING": len(rows) - len(ended),
        "rows with a false state or value": sum(not is_true(row) for row in ended),
        "runs left RUNNING": len(runs) - len(closed),
        "runs too many of their trial": max(0, len(runs) - 1),
        "series with a step missing": sum(
            not set(range(1, last + 1)) <= set(run.epochs) for run, last in zip(closed, lasts, strict=True)
        ),
        "series with a step twice": sum(len(run.epochs) > len(set(run.epochs)) for run in closed),
    }


def is_true(row: FrozenTrial) -> bool:
    """Whether a toy with the row's x can have ended so."""
    x, state = row.params["x"], row.state
    if state == TrialState.COMPLETE:
        return x <= DIVERGES_ABOVE and abs(row.value - value(x)) < 1e-9
    if state == TrialState.PRUNED:
        return 0 < len(row.intermediate_values) < EPOCHS
    return x > DIVERGES_ABOVE


if __name__ == "__main__":
    side, out, trials, pause = sys.argv[1:]
    SIDES[side](Path(out), int(trials), float(pause))
