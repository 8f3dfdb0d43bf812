"""Real trials in a driver's process of its own, and when each was at work: `... OUT HOW TRIALS EPOCHS STEPS`.

HOW is `study`: a study of glyphs, on SLOTS slots; `plain`: the same trials under Ray Tune alone, which keeps nothing of
them; or `recorded`: the study on one slot, its trials in turn without a recorder, with one over SQLite, and with one
over an MLflow server. Leaves `told.jsonl` in OUT, a line for every report, and of `recorded` what the driver bore of
each trial, in `borne.json`.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest.mock import patch

import ray
from ray import tune

from hdml_core.config import Setting, to_settings
from hdml_core.datasets import data_root
from studies.machinery import driver
from studies.machinery.driver import Places, run_study
from studies.machinery.ledger import Row
from studies.machinery.records import Kind, Record, State, trial_id
from studies.machinery.resources import RAY_HABITS
from studies.machinery.space import Uniform
from studies.machinery.study import Study
from studies.machinery.tracking import Recorder
from studies.machinery.trial import run_job
from studies.machinery.worker import Job, as_worker
from tests.services import MlflowServer

SLOTS = 2
RECORDERS = ("none", "SQLite", "a server")


class Told(NamedTuple):
    """A report as it left its worker, before anyone took it."""

    worker: int
    trial: int
    at: float
    seconds: float
    """Of training, since the trial began."""


@dataclass(frozen=True)
class Work:
    """One trial in its worker."""

    worker: int
    begin: float
    """When its training began; later than that by its first checkpoint."""
    end: float
    """When its last report left."""
    training: float


def works(out: Path) -> dict[int, Work]:
    """What a driver's trials were at, by number."""
    told: dict[int, list[Told]] = defaultdict(list)
    for line in (out / "told.jsonl").read_text().splitlines():
        report = Told(*json.loads(line))
        told[report.trial].append(report)
    return {
        trial: Work(of[0].worker, of[0].at - of[0].seconds, of[-1].at, of[-1].seconds)
        for trial, of in sorted(told.items())
    }


def watched(config: Mapping[str, Any]) -> None:
    """Run a trial, and write down when it tells what."""
    job: Job = config["job"]
    tell = tune.report

    def report(metrics: Mapping[str, Any]) -> None:
        record: Record = metrics["record"]
        with (job.folder.parents[2] / "told.jsonl").open("a") as file:
            file.write(json.dumps(Told(os.getpid(), job.number, time.time(), record.seconds)) + "\n")
        tell(metrics)

    with patch.object(tune, "report", report):
        run_job(config)


def a_study(trials: int, epochs: int, steps: int) -> Study:
    """Trials that all take the same time."""
    base: dict[str, Setting] = {
        "loss.name": "npair",
        "hdml.beta": 1.0,
        "optim.epochs": epochs,
        "optim.steps_per_epoch": steps,
    }
    space = {"hdml.alpha": Uniform(1.0, 2.0)}
    return Study("slots", "?", space, base, trials=trials, sampler="random", pruner="none", parallel=SLOTS)


def plain(out: Path, study: Study) -> None:
    """The trials under Ray Tune alone."""
    os.environ.update(RAY_HABITS)
    settings, root = to_settings(study.config({"hdml.alpha": 1.0})), data_root()
    folders = [out / study.name / "trials" / trial_id(trial) for trial in range(study.trials)]
    jobs = [Job("search", trial, 1, settings, ({},), root, to, 1, 0.0, 3600.0) for trial, to in enumerate(folders)]
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    tune.Tuner(
        tune.with_resources(as_worker(watched), {"cpu": 1}),
        param_space={"job": tune.grid_search(jobs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=SLOTS, reuse_actors=True),
        run_config=tune.RunConfig(name="plain", storage_path=str(out), verbose=0),
    ).fit()


class Turns(ExitStack):
    """A recorder for each trial in its turn. What it has told is sent before the next trial begins."""

    def __init__(self, recorders: Mapping[str, Recorder | None]) -> None:
        super().__init__()
        self._recorders = recorders
        self.waited: dict[int, float] = defaultdict(float)
        """Seconds for which a trial's reports were with its recorder, and the trial waited for them."""
        self.processor: dict[int, float] = {}
        """Seconds that the driver's processor was at work from a trial's begin until all that it told was sent."""

    def __enter__(self) -> Self:
        for recorder in filter(None, self._recorders.values()):
            self.enter_context(recorder)
        return self

    def begin(self, kind: Kind, row: Row, settings: Mapping[str, Any]) -> None:
        self.processor[row.number] = -time.process_time()
        self._tell(row.number, lambda recorder: recorder.begin(kind, row, settings))

    def log(self, kind: Kind, number: int, record: Record) -> None:
        self._tell(number, lambda recorder: recorder.log(kind, number, record))

    def end(self, kind: Kind, number: int, state: State, reason: str) -> None:
        self._tell(number, lambda recorder: recorder.end(kind, number, state, reason))
        recorder = self._of(number)
        while recorder and recorder.unsent:
            time.sleep(0.01)
        self.processor[number] += time.process_time()

    def run_id(self, kind: Kind, number: int) -> str | None:
        recorder = self._of(number)
        return recorder.run_id(kind, number) if recorder else None

    def _of(self, number: int) -> Recorder | None:
        return self._recorders[RECORDERS[number % len(RECORDERS)]]

    def _tell(self, number: int, what: Callable[[Recorder], None]) -> None:
        begin = time.perf_counter()
        if recorder := self._of(number):
            what(recorder)
        self.waited[number] += time.perf_counter() - begin


@contextmanager
def in_turn(out: Path) -> Iterator[Turns]:
    """Have the study's trials recorded in turn, once the study asks for its recorder."""
    (out / "server").mkdir()
    with MlflowServer(out / "server", f"sqlite:///{out}/server/mlflow.db") as server:
        addresses = {"none": None, "SQLite": f"sqlite:///{out}/mlflow.db", "a server": server.url}

        def opened(where: str, uri: str) -> Recorder:
            artifacts = None if uri == server.url else out / "mlruns"
            recorder = Recorder(uri, "slots", "slots", out / f"spool of {where}", artifacts)
            recorder.open("?", {})
            return recorder

        turns = Turns({where: opened(where, uri) if uri else None for where, uri in addresses.items()})
        with patch.object(driver, "recording", lambda *study: turns):
            yield turns


def main(out: Path, how: str, trials: int, epochs: int, steps: int) -> None:
    """Run the trials of one kind."""
    study, places = a_study(trials, epochs, steps), Places.under(out)
    with patch.object(driver, "execute", partial(driver.execute, run=watched)):
        match how:
            case "study":
                run_study(study, places)
            case "plain":
                plain(out, study)
            case "recorded":
                with in_turn(out) as turns:
                    run_study(replace(study, parallel=1), places)
                (out / "borne.json").write_text(json.dumps([turns.waited, turns.processor]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
