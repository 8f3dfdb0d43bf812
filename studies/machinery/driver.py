"""A study from its declaration to its last trial: all is checked at the door, then Tune works through the ledger."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from hdml_core.config import Config, Settings, to_settings
from hdml_core.datasets import Dataset, data_root, validation_fold
from hdml_core.frozen import open_data
from hdml_core.training import new_run
from studies.machinery.ledger import Ledger, LedgerError, Row, open_storage, set_aside
from studies.machinery.progress import Progress
from studies.machinery.records import FINISHED, TAG_COMMIT, TAG_DATA, TAG_RECIPE, Kind, trial_id
from studies.machinery.search import Interrupt, LedgerScheduler, LedgerSearch, Series
from studies.machinery.space import to_json
from studies.machinery.study import Study
from studies.machinery.tracking import Recorder
from studies.machinery.trial import Job, run_job

RAY_HABITS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""Files of its own for every trial, other working folders, chatter: what a study does without."""


FOLDERS: Mapping[Kind, str] = {"floor": "floor", "baseline": "baseline", "search": "trials"}


@dataclass(frozen=True)
class Places:
    """Where studies read and write."""

    root: Path
    """The data root."""
    out: Path
    ledger_url: str
    tracking_uri: str

    @classmethod
    def under(cls, out: Path) -> "Places":
        """Everything in one folder, but for what the environment names; makes the folder.

        Raises LedgerError where it can't be written.
        """
        out = out.expanduser().absolute()
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
        except OSError as error:
            raise LedgerError(f"the output folder {out} can't be written: {error.strerror}") from error
        return cls(
            root=data_root().expanduser().absolute(),
            out=out,
            ledger_url=os.environ.get("HDML_LEDGER", f"sqlite:///{out}/ledger.db"),
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{out}/mlflow.db"),
        )

    def recorder(self, experiment: str) -> Recorder:
        """A recorder for the experiment; where no server keeps MLflow's files, they are kept here."""
        served = self.tracking_uri.startswith(("http:", "https:", "databricks"))
        return Recorder(self.tracking_uri, experiment, None if served else self.out / "mlruns")


@dataclass(frozen=True)
class Resources:
    """What each trial gets, and how many of them fit."""

    cpus: int
    gpus: float
    at_once: int


def run_study(study: Study, places: Places, fresh: bool = False) -> dict[Kind, Ledger]:
    """Run what is left of the study's budget, floor and baseline first; return its ledgers.

    Raises ConfigError, DataError, LedgerError or TrackerError, with nothing begun, for what can be known beforehand,
    and KeyboardInterrupt where it was interrupted, all states saved.
    """
    dataset = prepare(study.config(), places.root)
    if fresh:
        put_aside(study.name, places)
    ledgers = open_ledgers(study, places, floor=dataset.kind == "features")
    ledgers["search"].settle(terms(study, dataset), study.space)
    ledgers["search"].enqueue(study.first_points())
    with recording(places, study, ledgers["search"], dataset) as recorder:
        resources = start_ray(study)
        configs: Mapping[Kind, Callable[[Settings], Config]] = {
            "floor": study.config,
            "baseline": lambda _: study.baseline_config(),
            "search": study.config,
        }
        folder = places.out / study.name
        plan = [
            Series(
                kind,
                ledger,
                study.trials if kind == "search" else 1,
                study.goal,
                jobs(kind, configs[kind], places, folder / FOLDERS[kind], resources),
            )
            for kind, ledger in ledgers.items()
        ]
        execute(plan, recorder, resources, folder, study.hours)
    return ledgers


def prepare(config: Config, root: Path) -> Dataset:
    """Make the data ready for all trials, and build one run to see that it can be built.

    Raises DataError and ConfigError.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = open_data(config, root, device)
    train, _ = validation_fold(dataset.train, config.data.folds, config.data.fold)
    new_run(config, train)
    return dataset


def open_ledgers(study: Study, places: Places, floor: bool) -> dict[Kind, Ledger]:
    """Open the study's ledgers in the order in which their trials run; a floor is for features given beforehand."""
    storage = open_storage(places.ledger_url)
    ledgers: dict[Kind, Ledger] = {}
    if floor:
        ledgers["floor"] = Ledger(storage, f"{study.name}.floor", {}, direction=study.direction)
    if study.baseline is not None:
        ledgers["baseline"] = Ledger(storage, f"{study.name}.baseline", {}, direction=study.direction)
    ledgers["search"] = Ledger(
        storage,
        study.name,
        study.space,
        direction=study.direction,
        sampler=study.sampler,
        pruner=study.pruner,
        seed=study.seed,
    )
    return ledgers


def terms(study: Study, dataset: Dataset) -> dict[str, Any]:
    """What all trials of a study have in common; it makes them comparable, and it can be confirmed from this alone."""
    return {
        "settings": study.fixed(),
        "baseline": dict(study.baseline) if study.baseline is not None else None,
        "goal": study.goal,
        "direction": study.direction,
        "data": dataset.digest,
        "question": study.question,
        "base": dict(study.base),
        "space": to_json(study.space),
    }


def put_aside(name: str, places: Places) -> None:
    """Rename all that there is of a study to NAME@TIME: its folder, its experiment, and last its ledgers."""
    aside = f"{name}@{datetime.now():%Y-%m-%dT%H-%M-%S}"
    folder = places.out / name
    if folder.exists():
        folder.rename(folder.with_name(aside))
    places.recorder(name).set_aside(aside)
    set_aside(open_storage(places.ledger_url), name, aside)


def recording(places: Places, study: Study, ledger: Ledger, dataset: Dataset) -> Recorder:
    """Open the study's experiment and its parent run, which the ledger remembers."""
    tags = {TAG_COMMIT: commit(), TAG_DATA: dataset.digest, TAG_RECIPE: study.config().recipe}
    recorder = places.recorder(study.name)
    ledger.note("mlflow_run", recorder.open(study.name, study.question, tags, ledger.notes.get("mlflow_run")))
    return recorder


def start_ray(study: Study) -> Resources:
    """Join the cluster at RAY_ADDRESS, else start a Ray on this machine; see what a trial gets of it."""
    os.environ.update(RAY_HABITS)
    if not ray.is_initialized():
        alone = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **alone)
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    there = ray.cluster_resources()
    gpus = study.gpus_per_trial if there.get("GPU", 0) > 0 else 0.0
    fit = int(there["CPU"] // study.cpus_per_trial)
    if gpus:
        fit = min(fit, int(there["GPU"] / gpus))
    return Resources(study.cpus_per_trial, gpus, at_once=max(1, min(fit, study.parallel)))


def jobs(
    kind: Kind, config: Callable[[Settings], Config], places: Places, folder: Path, resources: Resources
) -> Callable[[Row], Job]:
    """What a row of the ledger has to run."""
    return lambda row: Job(
        kind,
        row.number,
        to_settings(config(row.params)),
        places.root,
        folder / trial_id(row.number),
        resources.cpus,
        resources.gpus,
    )


def execute(
    plan: Sequence[Series],
    recorder: Recorder,
    resources: Resources,
    folder: Path,
    hours: float,
    run: Callable[[Any], None] = run_job,
) -> None:
    """Have Tune run what the plan's ledgers still lack.

    Raises KeyboardInterrupt after a Ctrl-C, once everything is stopped and saved; a second one does not wait.
    """
    done = sum(row.state in FINISHED for series in plan for row in series.ledger.rows())
    progress = Progress(done, sum(series.trials for series in plan), plan[-1].goal)
    interrupt = Interrupt()

    def stop(signum: int, frame: Any) -> None:
        interrupt.event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        tune.Tuner(
            tune.with_resources(run, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearch(plan, time.monotonic() + 3600 * hours),
                scheduler=LedgerScheduler(plan, recorder, progress),
                num_samples=-1,
                max_concurrent_trials=resources.at_once,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"{datetime.now():%Y-%m-%dT%H-%M-%S}",
                storage_path=str(folder / "tune"),
                stop=interrupt,
                verbose=0,
            ),
        ).fit()
    finally:
        signal.signal(signal.SIGINT, before)
        progress.close()
    if interrupt.event.is_set():
        raise KeyboardInterrupt


def commit() -> str:
    """The commit that the code is at, marked where files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _trial_name(trial: Any) -> str:
    job: Job = trial.config["job"]
    return trial_id(job.number) if job.kind == "search" else f"{job.kind}-{trial_id(job.number)}"
