"""One trial in a worker: a job in, a record after every epoch out. The core under Ray Tune.

A trial is one training for each of its parts, its folds and seeds. It begins with its checkpoints, if it has any, and
tells again what it told before: a record that was lost on its way arrives then, and one that was not is recognised by
its epoch.
"""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from hdml_core import checkpoint, parallel
from hdml_core.config import Config, with_settings
from hdml_core.datasets import DataError, Dataset, LabelledSet, validation_fold
from hdml_core.frozen import open_data
from hdml_core.notation import EpochReport, RetrievalReport
from hdml_core.retrieval import evaluate_retrieval
from hdml_core.training import Run, evaluate, fit, new_run
from studies.machinery import ranks
from studies.machinery.records import (
    GPU_SECONDS,
    HELD_MEMORY,
    PAPER,
    PART,
    PEAK_MEMORY,
    SECONDS,
    TAG_ATTEMPT,
    TAG_DEVICE,
    TAG_HOST,
    TAG_SET_ASIDE,
    TEST,
    VALIDATION,
    Kind,
    Record,
    hardness_trace,
    retrieval_metrics,
    training_metrics,
)
from studies.machinery.store import bring, demand_ownership, keep, leave, take_over
from studies.machinery.worker import Job, Tell, in_time, memory_mb, part_folder

GPU_PATIENCE = 60
"""Seconds for which a trial waits for another to give back the memory of the GPU that they share."""


class GpuBusyError(RuntimeError):
    """Others hold the memory that the trial was promised."""


def run_job(config: Mapping[str, Any]) -> None:
    """Run the job of a Tune config, reporting {"record": Record} after every epoch."""
    job = take_over(config["job"])
    try:
        with ranks.others(job, run_beside) as job:
            _run(job, in_time(job))
    finally:  # Tune ends a trial that has told its last epoch, or is given up, where it stands
        leave(job)


def run_beside(job: Job) -> None:
    """Run a job as one of its ranks that does not lead."""
    _run(job, lambda record: None)


def _run(job: Job, tell: Tell) -> None:
    torch.set_num_threads(job.cpus)
    if job.gpus > 0:
        torch.cuda.reset_peak_memory_stats()
        demand_gpu_memory(job.gpus / job.processes)
    with ranks.joined(job, _device(job)):
        TRIALS[job.kind.partition("-")[0]](job, tell)


def demand_gpu_memory(share: float) -> None:
    """Wait until the GPU has the trial's share of its memory free, and let the trial take no more than that.

    Raises GpuBusyError where it does not come free in GPU_PATIENCE seconds.
    """
    wanted = 0.9 * min(share, 1.0)
    torch.cuda.empty_cache()  # what this process's last trial left with torch is free, and must be seen to be
    for _ in range(GPU_PATIENCE):
        free, total = torch.cuda.mem_get_info()
        if free >= wanted * total:
            break
        time.sleep(1)
    else:
        raise GpuBusyError(
            f"a trial with {share:g} GPU must find {wanted:.0%} of the GPU's memory free, got {free / total:.0%} for "
            f"{GPU_PATIENCE} s: end what else runs there, or give fewer trials a larger --gpus-per-trial"
        )
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)


@dataclass(frozen=True)
class Done:
    """What the parts that ended have come to."""

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    qualities: tuple[Mapping[str, float], ...] = ()


def validated(job: Job, tell: Tell) -> None:
    """Train each part on all folds but its own, and validate on that one after every epoch."""
    done = Done()
    for part, changes in enumerate(job.parts):
        config = with_settings(job.config, changes)
        dataset = _data(config, job)
        train, validation = validation_fold(dataset.train, config.data.folds, config.data.fold)
        run = new_run(config, train, _device(job))

        def qualities(report: EpochReport) -> dict[str, float]:
            assert report.validation is not None  # a fold is held out
            return retrieval_metrics(VALIDATION, report.validation)

        done = _run_part(job, part, run, train, validation, qualities, tell, done)


def sealed(job: Job, tell: Tell) -> None:
    """Train on all training classes, and look at the test classes once, at the end."""
    config = job.config
    dataset = _data(config, job)
    run = new_run(config, dataset.train, _device(job))

    def qualities(report: EpochReport) -> dict[str, float]:
        last = report.epoch == config.optim.epochs
        return retrieval_metrics(TEST, evaluate(run, dataset.test)) if last else {}

    _run_part(job, 0, run, dataset.train, None, qualities, tell, Done())


def as_published(job: Job, tell: Tell) -> None:
    """Train on all training classes, and let the test classes choose the epoch, as most published numbers were made.

    The same training gives the honest number too, that of its last epoch.
    """
    config = job.config
    dataset = _data(config, job)
    run = new_run(config, dataset.train, _device(job))

    def qualities(report: EpochReport) -> dict[str, float]:
        looks = [earlier.validation for earlier in run.reports[: report.epoch] if earlier.validation is not None]
        chosen = max(looks, key=lambda look: look.recall_at[config.retrieval.ks[0]])
        last = retrieval_metrics(TEST, looks[-1]) if report.epoch == config.optim.epochs else {}
        return retrieval_metrics(PAPER, chosen) | last

    _run_part(job, 0, run, dataset.train, dataset.test, qualities, tell, Done())


def floor(job: Job, tell: Tell) -> None:
    """Measure the features that are given, nothing trained: what any embedding of them has to beat."""
    reached = []
    for changes in job.parts:
        config = with_settings(job.config, changes)
        dataset = _data(config, job)
        _, validation = validation_fold(dataset.train, config.data.folds, config.data.fold)
        reached.append(retrieval_metrics(VALIDATION, _of_features(config, validation, _device(job))))
    found = _means(reached)
    test = retrieval_metrics(TEST, _of_features(job.config, dataset.test, _device(job)))
    tell(
        Record(
            epoch=1,
            step=0,
            seconds=0.0,
            metrics=found | test | _costs(job, 0.0),
            part=0,
            part_qualities=found,
            ends_part=True,
            trace={},
            tags=_tags(job),
            last=True,
        )
    )


TRIALS: Mapping[Kind, Callable[[Job, Tell], None]] = {
    "search": validated,
    "baseline": validated,
    "floor": floor,
    "confirm": sealed,
    "paper": as_published,
}


def _run_part(
    job: Job,
    part: int,
    run: Run,
    train: LabelledSet,
    held_out: LabelledSet | None,
    qualities: Callable[[EpochReport], dict[str, float]],
    tell: Tell,
    done: Done,
) -> Done:
    """Train one part from its checkpoint to its end, telling every epoch; return what has been done then."""
    folder = part_folder(job.folder, part)
    leads, shared = job.rank == 0, job.processes > 1
    tags = _tags(job)
    if leads:
        bring(job, folder)
        tags |= _restored(run, folder, job.attempt)
    if shared:
        parallel.share_out(run)
        parallel.agree(run)
    total = run.config.optim.epochs

    own: dict[str, float] = {}

    def told(report: EpochReport) -> None:
        nonlocal own
        own = qualities(report)
        ends_part = report.epoch == total
        seconds = done.seconds + sum(earlier.seconds for earlier in run.reports[: report.epoch])
        tell(
            Record(
                epoch=done.epochs + report.epoch,
                step=done.steps + report.step,
                seconds=seconds,
                metrics=training_metrics(report)
                | (own if len(job.parts) == 1 else _over_parts((*done.qualities, own), ends_part))
                | _costs(job, seconds),
                part=part,
                part_qualities=own,
                ends_part=ends_part,
                trace=hardness_trace(report, total * len(job.parts), done.steps),
                tags=tags,
                last=ends_part and part == len(job.parts) - 1,
            )
        )

    def save_and_tell(report: EpochReport) -> None:
        if shared:
            parallel.agree(run)
        if leads:
            demand_ownership(job)
            keep(job, checkpoint.save(run, folder))
        told(report)

    for report in list(run.reports):
        told(report)
    fit(run, train, held_out, save_and_tell)
    return Done(
        done.epochs + total,
        done.steps + run.step,
        done.seconds + sum(report.seconds for report in run.reports),
        (*done.qualities, own),
    )


def _restored(run: Run, folder: Path, attempt: int) -> dict[str, str]:
    """Restore the run from its checkpoints, or leave it at its start where there are none that can be read."""
    try:
        checkpoint.load(run, folder)
    except checkpoint.CheckpointError:
        aside = folder.with_name(f"{folder.name}.unreadable-{attempt}")
        folder.rename(aside)
        return {TAG_SET_ASIDE: str(aside)}
    return {}


def _over_parts(reached: Sequence[Mapping[str, float]], ends_part: bool) -> dict[str, float]:
    """What the latest part reached by itself, and, where it has ended, the mean over all parts so far."""
    own = {f"{PART}/{name.partition('/')[2]}": value for name, value in reached[-1].items()}
    return own | (_means(reached) if ends_part else {})


def _means(reached: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(part[name] for part in reached) for name in reached[0]}


def _costs(job: Job, seconds: float) -> dict[str, float]:
    if job.gpus > 0:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        # Of the worker process, which trials share one after another; in KiB, on a Mac in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    held, gpu_held = memory_mb()
    return {
        SECONDS: seconds,
        GPU_SECONDS: seconds * job.gpus,
        PEAK_MEMORY: peak,
        HELD_MEMORY: gpu_held if job.gpus > 0 else held,
    }


def _data(config: Config, job: Job) -> Dataset:
    dataset = open_data(config, job.root, _device(job))
    if job.data not in ("", dataset.digest):
        raise DataError(
            f"{config.data.name} in {job.root} on {platform.node()} must be the study's data, digest {job.data}, got "
            f"{dataset.digest}: put the same archives there, or set HDML_ARCHIVES to where all nodes get them from"
        )
    return replace(dataset, train=dataset.train.on(_device(job))) if config.data.resident else dataset


def _device(job: Job) -> torch.device:
    return torch.device("cuda" if job.gpus > 0 else "cpu")


def _tags(job: Job) -> dict[str, str]:
    device = torch.cuda.get_device_name() if job.gpus > 0 else "cpu"
    return {TAG_DEVICE: device, TAG_HOST: platform.node(), TAG_ATTEMPT: str(job.attempt)}


def _of_features(config: Config, rows: LabelledSet, device: torch.device) -> RetrievalReport:
    everything, first = np.arange(len(rows)), np.zeros(len(rows), dtype=int)
    y = normalize(rows.take(everything, device, first), dim=1)
    labels = torch.from_numpy(rows.labels).to(device)
    return evaluate_retrieval(y, labels, config.retrieval.ks, config.retrieval.clusterings, config.seed)
