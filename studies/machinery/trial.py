"""One trial in a worker: a job in, a record after every epoch out. The core under Ray Tune.

A trial is one training for each of its parts, its folds and seeds, one after another or all at once. It begins with
its checkpoints, if it has any, and tells again what it told before: a record that was lost on its way arrives then, and
one that was not is recognised by its epoch.
"""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from hdml_core import checkpoint, parallel
from hdml_core.config import Config, DataConfig, with_settings
from hdml_core.datasets import DATASETS, DataError, Dataset, LabelledSet, validation_fold
from hdml_core.datasets.archives import identity
from hdml_core.frozen import open_data
from hdml_core.fused import fit_together, why_apart
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
from studies.machinery.worker import DATA, Job, Tell, in_time, memory_mb, part_folder

RESIDENT = 0.25
"""Of the memory that a trial has on a GPU, what its data may take to be kept there."""

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
        free += torch.cuda.memory_reserved()  # by data that it keeps for its next trial
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
class Part:
    """One of the trainings that a trial is made of."""

    run: Run
    train: LabelledSet
    held_out: LabelledSet | None
    qualities: Callable[[EpochReport], dict[str, float]]
    """What to tell of an epoch's retrieval."""


def validated(job: Job, tell: Tell) -> None:
    """Train each part on all folds but its own, and validate on that one after every epoch.

    On frozen features all parts train at once, epoch by epoch, unless the job wants them in turn.
    """
    rest = (_of_fold(job, number) for number in range(len(job.parts)))
    first = next(rest)
    one_by_one = job.in_turn or job.processes > 1 or why_apart([first.run])
    parts = chain([first], rest)
    del first  # in turn, none is held for longer than it trains
    if one_by_one or len(job.parts) == 1:
        _in_turn(job, parts, tell)
    else:
        _at_once(job, [*parts], tell)


def _of_fold(job: Job, number: int) -> Part:
    config = with_settings(job.config, job.parts[number])
    train, validation = validation_fold(_data(config, job).train, config.data.folds, config.data.fold)

    def qualities(report: EpochReport) -> dict[str, float]:
        assert report.validation is not None  # a fold is held out
        return retrieval_metrics(VALIDATION, report.validation)

    return Part(new_run(config, train, _device(job)), train, validation, qualities)


def sealed(job: Job, tell: Tell) -> None:
    """Train on all training classes, and look at the test classes once, at the end."""
    config = job.config
    dataset = _data(config, job)
    run = new_run(config, dataset.train, _device(job))

    def qualities(report: EpochReport) -> dict[str, float]:
        last = report.epoch == config.optim.epochs
        return retrieval_metrics(TEST, evaluate(run, dataset.test)) if last else {}

    _in_turn(job, [Part(run, dataset.train, None, qualities)], tell)


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

    _in_turn(job, [Part(run, dataset.train, dataset.test, qualities)], tell)


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


def _in_turn(job: Job, parts: Iterable[Part], tell: Tell) -> None:
    """Train each part from its checkpoint to its end before the next one, telling every epoch."""
    teller = _Teller(job, tell)
    for number, part in enumerate(parts):
        told = partial(teller, number, part, _begin(job, number, part.run))
        for report in list(part.run.reports):
            told(report)
        fit(part.run, part.train, part.held_out, partial(_save_and_tell, job, number, part.run, told))


def _save_and_tell(job: Job, number: int, run: Run, told: Callable[[EpochReport], None], report: EpochReport) -> None:
    _save(job, number, run)
    told(report)


def _at_once(job: Job, parts: Sequence[Part], tell: Tell) -> None:
    """Train all parts from their checkpoints to their ends, telling an epoch of each, part after part, then the next.

    Where the trial was stopped between two of its checkpoints, some parts are an epoch ahead: theirs is told when the
    others have caught up, so that all are always told in one order.
    """
    teller = _Teller(job, tell)
    runs = [part.run for part in parts]
    told = [partial(teller, number, part, _begin(job, number, part.run)) for number, part in enumerate(parts)]
    saved = [run.epoch for run in runs]
    turns = iter([(epoch, number) for epoch in range(runs[0].config.optim.epochs) for number in range(len(parts))])
    due = next(turns, None)

    def tell_what_is_due() -> None:
        nonlocal due
        while due is not None and due[0] < saved[due[1]]:
            epoch, number = due
            due = next(turns, None)
            told[number](runs[number].reports[epoch])

    def save_and_tell(number: int, report: EpochReport) -> None:
        _save(job, number, runs[number])
        saved[number] = report.epoch
        tell_what_is_due()

    tell_what_is_due()
    fit_together(runs, [part.train for part in parts], [part.held_out for part in parts], save_and_tell)


class _Teller:
    """Tells the epochs of a trial's parts, and counts them through in the order in which they are told."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self._job = job
        self._tell = tell
        self._epochs, self._steps, self._seconds = 0, 0, 0.0
        self._starts = [0]
        """Where each part's hardness begins: there it is laid out part after part, however they are told."""
        self._ended: list[Mapping[str, float]] = []
        """What the parts that ended have come to."""

    def __call__(self, number: int, part: Part, tags: Mapping[str, str], report: EpochReport) -> None:
        job, run = self._job, part.run
        total = run.config.optim.epochs
        if number == len(self._starts) - 1:
            self._starts.append(self._starts[number] + total * run.batches.steps)
        own, ends_part = part.qualities(report), report.epoch == total
        self._epochs += 1
        self._steps += run.batches.steps
        self._seconds += report.seconds
        reached = [*self._ended, own]
        if ends_part:
            self._ended = reached
        self._tell(
            Record(
                epoch=self._epochs,
                step=self._steps,
                seconds=self._seconds,
                metrics=training_metrics(report)
                | (own if len(job.parts) == 1 else _over_parts(reached, ends_part))
                | _costs(job, self._seconds),
                part=number,
                part_qualities=own,
                ends_part=ends_part,
                trace=hardness_trace(report, total * len(job.parts), self._starts[number]),
                tags=tags,
                last=ends_part and number == len(job.parts) - 1,
            )
        )


def _begin(job: Job, number: int, run: Run) -> dict[str, str]:
    """Restore a part's run from its checkpoint, on all ranks; return the tags of what it tells."""
    tags = _tags(job)
    if job.rank == 0:
        folder = part_folder(job.folder, number)
        bring(job, folder)
        tags |= _restored(run, folder, job.attempt)
    if job.processes > 1:
        parallel.share_out(run)
        parallel.agree(run)
    return tags


def _save(job: Job, number: int, run: Run) -> None:
    """Keep a part's run as it is after an epoch."""
    if job.processes > 1:
        parallel.agree(run)
    if job.rank == 0:
        demand_ownership(job)
        keep(job, checkpoint.save(run, part_folder(job.folder, number)))


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
    """Return the run's data: those of an earlier part or trial in this worker, unless theirs would be others by now."""
    device = _device(job)
    source = DATASETS[config.data.name](config.data, job.root)
    weights = Path(config.network.weights).expanduser()
    decide = (
        (job.root, device),
        replace(config.data, batch_size=DataConfig.batch_size, folds=DataConfig.folds, fold=DataConfig.fold),
        (config.network.extractor, config.network.frozen, config.network.weights),
        tuple(source.identity),
        tuple(identity(weights)) if weights.is_file() else (),
    )
    dataset = DATA.take(decide, lambda: _opened(config, job))
    if job.data not in ("", dataset.digest):
        raise DataError(
            f"{config.data.name} in {job.root} on {platform.node()} must be the study's data, digest {job.data}, got "
            f"{dataset.digest}: put the same archives there, or set HDML_ARCHIVES to where all nodes get them from"
        )
    return dataset


def _opened(config: Config, job: Job) -> Dataset:
    device = _device(job)
    dataset = open_data(config, job.root, device)
    stays = config.data.resident and dataset.train.nbytes <= _room_for_data(job)
    return replace(dataset, train=dataset.train.on(device)) if stays else dataset


def _room_for_data(job: Job) -> float:
    """How many bytes of data a trial may keep on its GPU; without one, a memory map is as near as anything."""
    if job.gpus == 0:
        return 0.0
    share = min(job.gpus / job.processes, 1.0)
    return RESIDENT * share * torch.cuda.mem_get_info()[1]


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
