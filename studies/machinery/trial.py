"""One trial in a worker: a job in, a record after every epoch out. The core under Ray Tune.

A trial begins with its checkpoint, if it has one, and tells again what it told before: a record that was lost on its
way arrives then, and one that was not is recognised by its epoch.
"""

import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch.nn.functional import normalize

from hdml_core import checkpoint
from hdml_core.config import Config, Setting, with_settings
from hdml_core.datasets import LabelledSet, validation_fold
from hdml_core.frozen import open_data
from hdml_core.notation import EpochReport, RetrievalReport
from hdml_core.retrieval import evaluate_retrieval
from hdml_core.training import Run, evaluate, fit, new_run
from studies.machinery.records import (
    GPU_SECONDS,
    PEAK_MEMORY,
    SECONDS,
    TAG_DEVICE,
    TAG_HOST,
    TEST,
    VALIDATION,
    Kind,
    Record,
    hardness_trace,
    retrieval_metrics,
    training_metrics,
)


@dataclass(frozen=True)
class Job:
    """All that a worker has to know of a trial."""

    kind: Kind
    number: int
    settings: Mapping[str, Setting]
    root: Path
    """The data root."""
    folder: Path
    """Where the trial's checkpoints are kept."""
    cpus: int
    gpus: float

    @property
    def config(self) -> Config:
        """The trial's run."""
        return with_settings(Config(), self.settings)

    @property
    def device(self) -> torch.device:
        """Where the trial computes."""
        return torch.device("cuda" if self.gpus > 0 else "cpu")


def run_job(config: Mapping[str, Any]) -> None:
    """Run the job of a Tune config, reporting {"record": Record} after every epoch."""
    job: Job = config["job"]
    torch.set_num_threads(job.cpus)
    TRIALS[job.kind](job)


def validated(job: Job) -> None:
    """Train on all folds but one, and validate on that one after every epoch."""
    config = job.config
    dataset = open_data(config, job.root, job.device)
    train, validation = validation_fold(dataset.train, config.data.folds, config.data.fold)
    run = new_run(config, train, job.device)

    def tell(report: EpochReport) -> None:
        qualities = retrieval_metrics(VALIDATION, report.validation)
        tune.report({"record": _record(job, run, report, qualities)})

    _resume_and_fit(job, run, train, validation, tell)


def sealed(job: Job) -> None:
    """Train on all training classes, and look at the test classes once, at the end."""
    config = job.config
    dataset = open_data(config, job.root, job.device)
    run = new_run(config, dataset.train, job.device)

    def tell(report: EpochReport) -> None:
        last = report.epoch == config.optim.epochs
        qualities = retrieval_metrics(TEST, evaluate(run, dataset.test)) if last else {}
        tune.report({"record": _record(job, run, report, qualities)})

    # All training classes train here: what `fit` finds of a fold of them says nothing, and is not told.
    _, seen = validation_fold(dataset.train, config.data.folds, config.data.fold)
    _resume_and_fit(job, run, dataset.train, seen, tell)


def floor(job: Job) -> None:
    """Measure the features that are given, nothing trained: what any embedding of them has to beat."""
    config = job.config
    dataset = open_data(config, job.root, job.device)
    _, validation = validation_fold(dataset.train, config.data.folds, config.data.fold)
    qualities = {
        **retrieval_metrics(VALIDATION, _of_features(config, validation, job.device)),
        **retrieval_metrics(TEST, _of_features(config, dataset.test, job.device)),
    }
    tune.report({"record": Record(1, 0, 0.0, qualities | _costs(job, 0.0), {}, _tags(job), last=True)})


TRIALS = {"search": validated, "baseline": validated, "floor": floor, "confirm": sealed}


def _resume_and_fit(job: Job, run: Run, train: LabelledSet, validation: LabelledSet, tell: Any) -> None:
    checkpoint.load(run, job.folder)
    for report in list(run.reports):
        tell(report)

    def save_and_tell(report: EpochReport) -> None:
        checkpoint.save(run, job.folder)
        tell(report)

    fit(run, train, validation, save_and_tell)


def _record(job: Job, run: Run, report: EpochReport, qualities: dict[str, float]) -> Record:
    epochs = run.config.optim.epochs
    seconds = sum(earlier.seconds for earlier in run.reports[: report.epoch])
    return Record(
        report.epoch,
        report.step,
        seconds,
        training_metrics(report) | qualities | _costs(job, seconds),
        hardness_trace(report, epochs),
        _tags(job),
        last=report.epoch == epochs,
    )


def _costs(job: Job, seconds: float) -> dict[str, float]:
    if job.gpus > 0:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        # Of the worker process, which trials share one after another; in KiB, on a Mac in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {SECONDS: seconds, GPU_SECONDS: seconds * job.gpus, PEAK_MEMORY: peak}


def _tags(job: Job) -> dict[str, str]:
    device = torch.cuda.get_device_name() if job.gpus > 0 else "cpu"
    return {TAG_DEVICE: device, TAG_HOST: platform.node()}


def _of_features(config: Config, rows: LabelledSet, device: torch.device) -> RetrievalReport:
    y = normalize(torch.from_numpy(rows.values[rows.rows, 0]).to(device), dim=1)
    labels = torch.from_numpy(rows.labels).to(device)
    return evaluate_retrieval(y, labels, config.retrieval.ks, config.retrieval.clusterings, config.seed)
