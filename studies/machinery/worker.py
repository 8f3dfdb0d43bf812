"""What keeps a worker process honest: the job it has, the watch it is under, the memory it holds.

Knows nothing of training, and does not import torch: what a job of some kind does is `trial`'s.
"""

import atexit
import faulthandler
import gc
import math
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psutil
from ray import tune
from ray.tune.trainable import wrap_function

from hdml_core.config import Config, ConfigError, Setting, Settings, with_settings
from hdml_core.datasets.base import DataError, Dataset
from studies.machinery.records import Kind, Record

if TYPE_CHECKING:
    from studies.machinery.store import Store

HOPELESS = (FloatingPointError, ConfigError, DataError)
"""What a trial would raise again if it were tried again; whatever else ends it may not come back."""

GROWTH_MB, GPU_GROWTH_MB = 1024, 64
"""A worker whose memory grew by more over its trials is replaced by a fresh process."""

Tell = Callable[[Record], None]
T = TypeVar("T")


class FreshProcessError(RuntimeError):
    """The worker is spent, and this trial, not yet begun, wants a new one."""


@dataclass(frozen=True)
class Job:
    """All that a worker has to know of a trial."""

    kind: Kind
    number: int
    attempt: int
    """Grows whenever the trial is taken in hand, and fences off whoever had it before."""
    settings: Mapping[str, Setting]
    parts: tuple[Settings, ...]
    """What to change of the settings for each of the trainings that the trial is made of."""
    root: Path
    """The data root."""
    folder: Path
    """Where the trial's checkpoints are kept, or, `kept_in` given, written first."""
    cpus: int
    gpus: float
    hang_seconds: float
    data: str = ""
    """Digest of the data that all trials of the study have in common; empty: of whichever data there are."""
    store: "Store | None" = None
    """Where checkpoints go from machines that don't see the study's folder."""
    kept_in: Path | None = None
    """On such a machine, the trial's folder on the driver's disk."""
    processes: int = 1
    """How many train it together, its ranks; each has `cpus` CPUs, and they share its `gpus` evenly."""
    rank: int = 0
    meeting: str = ""
    """HOST:PORT where the ranks meet."""
    in_turn: bool = False
    """Train the parts one after another: what gives a trial up hears of each as it ends, and is to save the others."""

    @property
    def config(self) -> Config:
        """The trial's run."""
        return with_settings(Config(), self.settings)

    @property
    def hung(self) -> Path:
        """Where it is written what a worker was at when its time was over."""
        return self.folder / f"hung-{self.attempt}.txt"


class Kept(Generic[T]):
    """What a worker keeps from one trial to the next, so that none has to open it anew; one thing at a time."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._thing: T | None = None
        self.mb = (0.0, 0.0)
        """What it takes of the process's memory and of the GPU's."""

    def take(self, key: Hashable, open_it: Callable[[], T]) -> T:
        """Return what is kept under this key; where that is another, let go of it first."""
        if self._thing is None or key != self._key:
            self._thing, self.mb = None, (0.0, 0.0)
            before, gpu_before = memory_mb()
            self._key, self._thing = key, open_it()
            after, gpu_after = memory_mb()
            self.mb = (after - before, gpu_after - gpu_before)
        return self._thing


DATA: Kept[Dataset] = Kept()
"""The data of the worker's last trial."""


def as_worker(run: Callable[[Mapping[str, Any]], None]) -> type:
    """A Tune trainable that runs one trial after another in one process, for as long as that stays clean."""

    class Worker(wrap_function(run)):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            self._at_first = leakable_mb()
            # All modules are there, for good: to look through them after every trial would take a quarter of a second.
            gc.freeze()
            atexit.register(gc.unfreeze)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not super().reset_config(new_config):
                raise FreshProcessError("the worker's last trial does not end")
            gc.collect()
            grown, gpu_grown = (now - first for now, first in zip(leakable_mb(), self._at_first, strict=True))
            if grown > GROWTH_MB or gpu_grown > GPU_GROWTH_MB:
                raise FreshProcessError(f"the worker's memory grew by {grown:.0f} MB, on the GPU {gpu_grown:.0f} MB")
            return True

    return Worker


def in_time(job: Job) -> Tell:
    """Return a report to Tune under a watch: between two reports no more than the job's `hang_seconds` may pass.

    The watch needs no turn of the interpreter, so that it ends also a worker that is stuck in a library; what every
    thread was at goes to `job.hung`. Waiting for the driver is not hanging.
    """
    if job.hang_seconds == math.inf:
        return lambda record: tune.report({"record": record})
    file = job.hung.open("w")

    def tell(record: Record) -> None:
        faulthandler.cancel_dump_traceback_later()
        tune.report({"record": record})
        if not record.last:
            faulthandler.dump_traceback_later(job.hang_seconds, exit=True, file=file)

    faulthandler.dump_traceback_later(job.hang_seconds, exit=True, file=file)
    return tell


def part_folder(folder: Path, part: int) -> Path:
    """Where in a trial's folder the checkpoints of a part are kept."""
    return folder / f"part-{part:02d}"


def memory_mb() -> tuple[float, float]:
    """The memory that this process holds for itself, files that it maps left out, and what torch holds of the GPU."""
    info = psutil.Process().memory_info()
    torch = sys.modules.get("torch")
    gpu = torch.cuda.memory_allocated() if torch and torch.cuda.is_initialized() else 0
    return (info.rss - getattr(info, "shared", 0)) / 2**20, gpu / 2**20


def leakable_mb() -> tuple[float, float]:
    """The same without the data that are kept on purpose."""
    held, gpu = (now - data for now, data in zip(memory_mb(), DATA.mb, strict=True))
    return held, gpu
