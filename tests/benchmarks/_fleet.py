"""One saturated driver, and what its trials cost it, the database and the tracker: `... OUT WHOSE TRIALS`.

WHOSE is `ours`: the toy study, its ledger in a PostgreSQL and its record on an MLflow server; `plain`: the same trials
under Ray Tune alone, which keeps neither; or `keeper`: nothing but checkpoints of far machines. Leaves `costs.json` in
OUT: seconds, and of a driver the processor seconds of each process, from when every actor has run two trials until the
last trial ends.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
from ray import tune

from hdml_core import whole
from studies.machinery.progress import Progress
from studies.machinery.resources import RAY_HABITS
from studies.machinery.search import Stateless
from studies.machinery.store import opened
from tests.machinery.toy_study import run_toy
from tests.machinery.toys import EPOCHS, GOAL, value
from tests.services import MlflowServer, PostgreSQL

ACTORS = 16
CHECKPOINT = 100_000_000
"""Bytes of one: those of a googlenet with its moments, or of a larger network."""


def climb(config: dict[str, float]) -> None:
    """The toy without all that a study keeps of it."""
    for epoch in range(1, EPOCHS + 1):
        tune.report({GOAL: value(config["x"], epoch), "train/j_m": 1.0 / epoch})


class Watch(Stateless, tune.Callback):
    """Looks at the clocks of processes when a trial ends, the first one that counts and the last."""

    def __init__(self, trials: int, watched: Mapping[str, psutil.Process]) -> None:
        self._ended, self._trials, self._watched = 0, trials, watched
        self.looks: list[dict[str, float]] = []

    def ended(self, *_: object) -> None:
        """A trial has ended."""
        self._ended += 1
        if self._ended in (2 * ACTORS, self._trials):
            clocks = {name: spent(process) for name, process in self._watched.items()}
            self.looks.append({"seconds": time.monotonic(), **clocks})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial of plain Tune's has ended."""
        self.ended()


def plain(out: Path, trials: int, watch: Watch) -> None:
    """The trials under Ray Tune alone."""
    tune.Tuner(
        tune.with_resources(climb, {"cpu": 1}),
        param_space={"x": tune.uniform(0.0, 1.0)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=ACTORS, reuse_actors=True),
        run_config=tune.RunConfig(name="plain", storage_path=str(out), verbose=0, callbacks=[watch]),
    ).fit()


def keeper(out: Path) -> None:
    """Checkpoints as far machines hand them over, eight at once, and the same written here."""
    os.environ["RAY_ADDRESS"] = "this one"
    checkpoint = {"state.safetensors": os.urandom(CHECKPOINT)}
    folders = [out / "study" / f"{trial:04d}" for trial in range(8)]
    with opened(out / "study") as store:
        assert store  # there is one on every cluster

        def hand_over() -> None:
            given = ray.put(checkpoint)
            ray.get([store.keeper.keep.remote(folder, 1, "part-00/epoch-1", given, ["epoch-1"]) for folder in folders])

        hand_over()  # starts the keeper
        costs = {"handed over": timed(hand_over)}
    costs["written"] = timed(lambda: [whole.put(folder / "part-00/epoch-2", checkpoint) for folder in folders])
    (out / "costs.json").write_text(json.dumps({"megabytes": 8 * CHECKPOINT / 1e6, **costs}))


def timed(work: Callable[[], object]) -> float:
    """Seconds of some work."""
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def spent(process: psutil.Process) -> float:
    """Processor seconds of a process, and of what it has started where that is a server's."""
    total = 0.0
    for each in [process, *([] if process.pid == os.getpid() else process.children(recursive=True))]:
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def main(out: Path, whose: str, trials: int) -> None:
    """Run so many trials, and write down what they cost."""
    os.environ.update(RAY_HABITS)
    if whose == "keeper":
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        keeper(out)
        return
    with ExitStack() as stack:
        watched = {"driver": psutil.Process()}
        if whose == "ours":
            database = stack.enter_context(PostgreSQL())
            tracker = stack.enter_context(MlflowServer(out, database.url("mlflow")))
            os.environ |= {"HDML_LEDGER": database.url("ledger"), "MLFLOW_TRACKING_URI": tracker.url}
            watched |= {"database": psutil.Process(database.process), "tracker": psutil.Process(tracker.process)}
        ray.init(address="local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False)
        watch = Watch(trials, watched)
        if whose == "ours":
            stack.enter_context(patch.object(Progress, "ended", watch.ended))
            run_toy(out, trials, parallel=ACTORS, sampler="random")
        else:
            plain(out, trials, watch)
    first, last = watch.looks
    costs = {name: last[name] - first[name] for name in first}
    (out / "costs.json").write_text(json.dumps({"trials": trials - 2 * ACTORS, **costs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
