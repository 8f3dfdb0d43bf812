"""Where the checkpoints of trials are kept: in the study's folder, whichever machine a worker is on.

A worker that sees the driver's disk, on the same machine or on shared storage, writes there. One that does not writes
on its own, and hands what it wrote to the keeper, a process beside the driver, through Ray's object store, before it
tells the epoch. So what was told is kept, and a trial goes on from there on any machine.

A trial's folder belongs to the latest attempt at the trial; earlier ones are refused.
"""

import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hdml_core import whole
from studies.machinery.records import trial_id
from studies.machinery.worker import Job

OWNER = "attempt.json"
"""File in a trial's folder: which attempt it belongs to."""


class SupersededError(RuntimeError):
    """A later attempt at the same trial has begun: this one may write no more."""


class Attempt(NamedTuple):
    """Which attempt at a trial it is, and where it is made."""

    number: int
    nodes: Sequence[str]
    """Ray's ids of the worker's node and of those of its other ranks; empty where the trial runs without Ray."""
    folder: str
    """Where it writes."""
    logs: Mapping[str, int]
    """The files that the worker's output goes to, and how long each was when the attempt began."""


@dataclass(frozen=True)
class Store:
    """How workers find out whether they see the study's folder, and whom they hand their checkpoints to if not."""

    folder: Path
    mark: str
    """Name of a file there that no other folder has."""
    keeper: Any
    """A Ray actor of Keeper."""

    def is_seen(self, folder: Path) -> bool:
        """Whether this process sees a trial's folder, which is in the study's: in an older one of it nobody knows."""
        return folder.is_relative_to(self.folder) and (self.folder / self.mark).exists()


@contextmanager
def opened(folder: Path) -> Iterator[Store | None]:
    """Keep the checkpoints of workers on other machines in the study's folder; on a Ray of this machine, nothing to do.

    The keeper is on the driver's node, and ends with the driver.
    """
    if "RAY_ADDRESS" not in os.environ:
        yield None
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # What it does may be done twice: where it dies it is started again, and asked again.
    keeper = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=8)(Keeper)
    keeper = keeper.options(scheduling_strategy=here).remote()
    store = Store(folder, f".seen-{uuid.uuid4().hex}", keeper)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.mark).touch()
    try:
        yield store
    finally:
        (folder / store.mark).unlink(missing_ok=True)
        ray.kill(keeper)


class Keeper:
    """Writes into trials' folders for workers that don't see them. A Ray actor."""

    def claim(self, folder: Path, attempt: Attempt) -> None:
        """Make a trial's folder an attempt's own."""
        _claim(folder, attempt)

    def keep(self, folder: Path, attempt: int, name: str, files: Mapping[str, bytes], beside: Sequence[str]) -> None:
        """Write a folder of files into a trial's folder; what there is beside it and not at the worker's goes."""
        _demand(folder, attempt)
        target = folder / name
        whole.put(target, files)
        for other in target.parent.iterdir():
            if other.is_dir() and other.name not in beside:
                shutil.rmtree(other)

    def give(self, folder: Path, attempt: int, name: str) -> dict[str, dict[str, bytes]]:
        """All folders of files in a part of a trial's folder, by name."""
        _demand(folder, attempt)
        kept = [path for path in (folder / name).glob("*") if path.is_dir() and not path.name.startswith(".")]
        return {path.name: _files(path) for path in kept}


def take_over(job: Job) -> Job:
    """Make the trial's folder this attempt's own; return the job with the folder to write in.

    Raises SupersededError where a later attempt was here.
    """
    if job.store is None or job.store.is_seen(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        _claim(job.folder, _attempt(job, job.folder))
        return job
    there = Path(tempfile.gettempdir()) / job.store.mark.strip(".") / job.kind / trial_id(job.number) / str(job.attempt)
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir(parents=True)
    ray.get(job.store.keeper.claim.remote(job.folder, _attempt(job, there)))
    return replace(job, folder=there, kept_in=job.folder)


def demand_ownership(job: Job) -> None:
    """Raise SupersededError where a later attempt has taken the trial's folder over, as far as this machine sees it."""
    if job.kept_in is None:
        _demand(job.folder, job.attempt)


def bring(job: Job, folder: Path) -> None:
    """Have in a folder within the trial's what earlier attempts have left there."""
    if job.kept_in is not None and job.store is not None:
        name = str(folder.relative_to(job.folder))
        for checkpoint, files in ray.get(job.store.keeper.give.remote(job.kept_in, job.attempt, name)).items():
            whole.put(folder / checkpoint, files)


def keep(job: Job, written: Path) -> None:
    """Have a checkpoint, just written within the trial's folder, outlive this machine.

    Raises SupersededError where a later attempt has taken the folder over.
    """
    if job.kept_in is not None and job.store is not None:
        name, beside = str(written.relative_to(job.folder)), [path.name for path in written.parent.iterdir()]
        ray.get(job.store.keeper.keep.remote(job.kept_in, job.attempt, name, _files(written), beside))


def leave(job: Job) -> None:
    """Tidy this machine up where nothing has to stay on it."""
    if job.kept_in is not None:
        shutil.rmtree(job.folder, ignore_errors=True)


def latest_attempt(folder: Path) -> Attempt | None:
    """Which attempt a trial's folder belongs to."""
    path = folder / OWNER
    return Attempt(**json.loads(path.read_text())) if path.exists() else None


def _attempt(job: Job, folder: Path) -> Attempt:
    return Attempt(job.attempt, _nodes(), str(folder), {str(path): path.stat().st_size for path in _logs()})


def _nodes() -> list[str]:
    if not ray.is_initialized():
        return []
    group = ray.util.get_current_placement_group()
    bundles = ray.util.placement_group_table(group)["bundles_to_node_id"].values() if group else []
    return list(dict.fromkeys([ray.get_runtime_context().get_node_id(), *bundles]))


def _logs() -> list[Path]:
    """The files that this process's output goes to."""
    if sys.platform != "linux":
        return []
    paths = [Path(f"/proc/self/fd/{stream}").resolve() for stream in (1, 2)]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _claim(folder: Path, attempt: Attempt) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _demand(folder, attempt.number)
    aside = folder / f".{OWNER}-{attempt.number}"
    aside.write_text(json.dumps(attempt._asdict()))
    aside.rename(folder / OWNER)


def _demand(folder: Path, attempt: int) -> None:
    latest = latest_attempt(folder)
    if latest is not None and latest.number > attempt:
        raise SupersededError(f"attempt {attempt} at {folder} was superseded by attempt {latest.number}")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
