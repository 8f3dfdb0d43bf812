"""A trial in several processes, its ranks: Ray places them together, each with a GPU of its own where there are GPUs.

The first is the trial's worker, which leads: it alone keeps checkpoints and reports. See `hdml_core.parallel` for what
they share.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hdml_core import parallel
from studies.machinery.worker import Job

PATIENCE = 60.0
"""Seconds until a rank that is gone must be known to be, with whatever it ended by."""


@contextmanager
def others(job: Job, work: Callable[[Job], None]) -> Iterator[Job]:
    """Have the trial's other ranks do the same work meanwhile; the job that is yielded says where they meet.

    Raises what another raised, where that is why this one could not go on. However it ends, none of them does.
    """
    if job.processes == 1:
        yield job
        return
    job = replace(job, meeting=_free_address())
    group = ray.util.get_current_placement_group()
    rest = [
        ray.remote(num_cpus=job.cpus, num_gpus=job.gpus / job.processes, max_retries=0)(work)
        .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank))
        .remote(replace(job, rank=rank))
        for rank in range(1, job.processes)
    ]
    try:
        yield job
        ray.get(rest)
    except RuntimeError:
        # What a rank hears of another that is gone: that one's own error tells more, once Ray has noticed.
        ended, _ = ray.wait(rest, timeout=PATIENCE)
        for rank in ended:
            _raise_as_it_was(rank)
        raise
    finally:
        for rank in rest:
            ray.cancel(rank, force=True)


@contextmanager
def joined(job: Job, device: torch.device) -> Iterator[None]:
    """Be one of the trial's ranks."""
    if job.processes == 1:
        yield
        return
    address, _, port = job.meeting.rpartition(":")
    parallel.start(job.rank, job.processes, address, int(port), device)
    try:
        yield
    finally:
        parallel.stop()


def _raise_as_it_was(rank: ray.ObjectRef) -> None:
    try:
        ray.get(rank)
    except RayTaskError as error:
        raise error.cause from error


def _free_address() -> str:
    """HOST:PORT of this machine, as the others reach it, where nobody listens yet."""
    with socket.create_server(("", 0)) as free:
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
