"""A study from its declaration to its last trial: all is checked at the door, then Tune works through the ledger."""

import math
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune import TuneError

from hdml_core.config import Config, to_settings
from hdml_core.datasets import Dataset, data_root, validation_fold
from hdml_core.frozen import open_data
from hdml_core.parallel import demand_extractor
from hdml_core.training import new_run
from studies.machinery.audit import floor_opened
from studies.machinery.disk import DiskCap
from studies.machinery.lease import Lease
from studies.machinery.ledger import ATTEMPTS, CHECKPOINTS, PRICE, Ledger, Row, best_points, set_aside, spent
from studies.machinery.progress import Progress
from studies.machinery.records import FINISHED, TAG_COMMIT, TAG_DATA, TAG_IMAGE_SIDE, TAG_RECIPE, Kind, trial_id
from studies.machinery.resources import Resources, Room, price_per_hour, start_ray
from studies.machinery.search import Interrupt, LedgerScheduler, LedgerSearch, Series, StopAll
from studies.machinery.space import to_json
from studies.machinery.storage import LedgerError, Storage, open_storage
from studies.machinery.store import Store
from studies.machinery.store import opened as stored
from studies.machinery.study import Study
from studies.machinery.tracking import Recorder
from studies.machinery.tracking import set_aside as set_experiment_aside
from studies.machinery.trial import run_job
from studies.machinery.worker import Job, as_worker

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

    def recorder(self, study: str, study_id: str) -> Recorder:
        """A recorder of the study; where no server keeps MLflow's files, they are kept here."""
        return Recorder(self.tracking_uri, study, study_id, self.spool(study), self.artifacts)

    def spool(self, study: str) -> Path:
        """Where the study's drivers keep what MLflow is to be told."""
        return self.out / study / "spool"

    @property
    def artifacts(self) -> Path | None:
        """Where MLflow's files are kept; None where a server keeps them."""
        served = self.tracking_uri.startswith(("http:", "https:", "databricks"))
        return None if served else self.out / "mlruns"


class Budget:
    """What a study may still spend: time of this driver, and GPU-hours and money of all its drivers so far."""

    def __init__(self, study: Study, plan: Sequence[Series], resources: Resources) -> None:
        self._deadline = time.monotonic() + 3600 * study.hours
        self._study = study
        self._price = price_per_hour(study, resources)
        self._plan = plan

    def may_begin(self) -> bool:
        """Whether another trial may be begun."""
        if time.monotonic() >= self._deadline:
            return False
        if self._study.gpu_hours == self._study.max_cost == math.inf:
            return True
        seconds, gpu_seconds = spent(row for series in self._plan for row in series.ledger.rows())
        return gpu_seconds / 3600 < self._study.gpu_hours and seconds / 3600 * self._price < self._study.max_cost


def run_study(
    study: Study,
    places: Places,
    *,
    fresh: bool = False,
    join: bool = False,
    retry_failed: bool = False,
    warm_start: str | None = None,
) -> dict[Kind, Ledger]:
    """Run what is left of the study's budget, floor and baseline first; return its ledgers.

    Raises ConfigError, DataError, LedgerError, LeaseError or TrackerError, with nothing begun, for what can be known
    beforehand, and KeyboardInterrupt where it was interrupted, all states saved.
    """
    dataset, *_ = [prepare(config, places.root, is_shared(study)) for config in study.configs().values()]
    storage = open_storage(places.ledger_url)
    points = [*study.first_points(), *best_points(storage, warm_start, study.search_space)]
    with Lease(storage.engine, study.name, join) as lease:
        if fresh:
            put_aside(storage, study.name, places)
        ledgers = open_ledgers(study, storage, lease, floor=dataset.kind == "features")
        search = ledgers["search"]
        search.settle(terms(study, dataset), study.space)
        search.enqueue(points)
        if retry_failed:
            search.enqueue_failed()
        with recording(places, study, search, dataset) as recorder, floor_opened(ledgers, recorder, commit()):
            resources = start_ray(study)
            search.note(PRICE, price_per_hour(study, resources))
            folder = places.out / study.name
            with stored(folder) as store:
                plan = [
                    series(study, kind, ledger, places.root, folder, dataset.digest, store, resources)
                    for kind, ledger in ledgers.items()
                ]
                execute(study, plan, recorder, resources, folder)
    return ledgers


def prepare(config: Config, root: Path, shared: bool = False) -> Dataset:
    """Make the data ready for all trials, and build one run to see that it can be built, and shared out if need be.

    Raises DataError and ConfigError.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = open_data(config, root, device)
    train, _ = validation_fold(dataset.train, config.data.folds, config.data.fold)
    run = new_run(config, train)
    if shared:
        demand_extractor(run)
    return dataset


def is_shared(study: Study) -> bool:
    """Whether several processes train each trial."""
    return max(study.gpus_per_trial, study.processes_per_trial) > 1


def open_ledgers(study: Study, storage: Storage, lease: Lease, floor: bool) -> dict[Kind, Ledger]:
    """Open the study's ledgers in the order in which their trials run; a floor is for features given beforehand."""
    directions = list(study.goals.values())
    ledgers: dict[Kind, Ledger] = {}
    if floor:
        ledgers["floor"] = Ledger(storage, f"{study.name}.floor", {}, lease, directions=directions)
    if study.baseline is not None:
        ledgers["baseline"] = Ledger(storage, f"{study.name}.baseline", {}, lease, directions=directions)
    parts = len(study.parts())
    ledgers["search"] = Ledger(
        storage,
        study.name,
        study.search_space,
        lease,
        directions=directions,
        sampler=study.sampler,
        pruner=study.pruner,
        steps=parts if study.steps_are_parts else parts * study.config().optim.epochs,
        seed=study.seed,
    )
    return ledgers


def terms(study: Study, dataset: Dataset) -> dict[str, Any]:
    """What all trials of a study have in common; it makes them comparable, and it can be confirmed from this alone."""
    return {
        "settings": study.fixed(),
        "arms": {arm: dict(settings) for arm, settings in study.arms.items()},
        "rivals": dict(study.rivals),
        "baseline": dict(study.baseline) if study.baseline is not None else None,
        "goals": dict(study.goals),
        "folds": study.folds,
        "seeds": study.seeds,
        "limits": dict(study.limits),
        "steps": "parts" if study.steps_are_parts else "epochs",
        "data": dataset.digest,
        "question": study.question,
        "base": dict(study.base),
        "space": to_json(study.space),
    }


def put_aside(storage: Storage, name: str, places: Places) -> None:
    """Rename all that there is of a study to NAME@TIME: its experiment, its folder, and last its ledgers."""
    aside = f"{name}@{datetime.now():%Y-%m-%dT%H-%M-%S}"
    set_experiment_aside(places.tracking_uri, name, aside)
    folder = places.out / name
    if folder.exists():
        folder.rename(folder.with_name(aside))
    set_aside(storage, name, aside)


def recording(places: Places, study: Study, ledger: Ledger, dataset: Dataset) -> Recorder:
    """Open the study's record."""
    recorder = places.recorder(study.name, ledger.identity())
    tags = {TAG_COMMIT: commit(), TAG_DATA: dataset.digest, TAG_RECIPE: study.config().recipe}
    if dataset.image_side is not None:
        tags[TAG_IMAGE_SIDE] = str(dataset.image_side)
    recorder.open(study.question, tags)
    return recorder


def series(
    study: Study,
    kind: Kind,
    ledger: Ledger,
    root: Path,
    folder: Path,
    data: str,
    store: Store | None,
    resources: Resources,
) -> Series:
    """The study's trials of one kind."""

    def job(row: Row) -> Job:
        config = study.baseline_config() if kind == "baseline" else study.config(row.params)
        return Job(
            kind,
            row.number,
            row.notes[ATTEMPTS],
            to_settings(config),
            study.parts(),
            root,
            Path(row.notes.get(CHECKPOINTS, folder / FOLDERS[kind] / trial_id(row.number))),
            resources.cpus,
            resources.gpus,
            60 * study.hang_minutes,
            data,
            store,
            processes=resources.processes,
            in_turn=study.steps_are_parts,
        )

    return Series(
        kind,
        ledger,
        study.trials if kind == "search" else 1,
        list(study.goals),
        job,
        study.limits if kind == "search" else {},
        study.max_attempts,
        steps_are_parts=study.steps_are_parts,
    )


def execute(
    study: Study,
    plan: Sequence[Series],
    recorder: Recorder,
    resources: Resources,
    folder: Path,
    run: Callable[[Any], None] = run_job,
) -> None:
    """Have Tune run what the plan's ledgers still lack.

    Raises KeyboardInterrupt after a Ctrl-C or a SIGTERM, once everything is stopped and saved, a second one does not
    wait; LeaseLostError or LedgerError where the ledger can't be written any longer.
    """
    done = sum(row.state in FINISHED for series in plan for row in series.ledger.rows())
    progress = Progress(done, sum(series.trials for series in plan), plan[-1].goals[0])
    interrupt = Interrupt()
    cap = DiskCap(study.disk_gb)
    tune_folder = folder / "tune" / uuid.uuid4().hex

    def stop(signum: int, frame: Any) -> None:
        interrupt.asked.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        tune.Tuner(
            tune.with_resources(as_worker(run), resources.placement),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearch(
                    plan, Budget(study, plan, resources).may_begin, Room(study, resources), interrupt
                ),
                scheduler=LedgerScheduler(plan, recorder, progress, interrupt, cap.keep),
                num_samples=-1,
                max_concurrent_trials=study.parallel,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=tune_folder.name, storage_path=str(tune_folder.parent), stop=StopAll(interrupt), verbose=0
            ),
        ).fit()
    except TuneError as error:
        raise interrupt.failure or error from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        progress.close()
        shutil.rmtree(tune_folder, ignore_errors=True)
    if interrupt.asked.is_set():
        raise KeyboardInterrupt


def commit() -> str:
    """The commit that the code is at, marked where files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if shutil.which("git") is None:
        return "unknown"
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _trial_name(trial: Any) -> str:
    job: Job = trial.config["job"]
    return trial_id(job.number) if job.kind == "search" else f"{job.kind}-{trial_id(job.number)}"
