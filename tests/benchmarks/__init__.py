"""Benchmarks: what our pieces cost, or lose, beside a peer or a physical floor, measured in the same run.

A benchmark is a module here with `run(quick)` that returns a list of Rows, Counts or Curves; no more has to be done.
Machines are noisy and of all kinds, so what counts is the ratio of medians, never a time by itself. Every figure is one
of which less is better: "ten times as many images a second" is a tenth of the time for an image. The package `gpu` is a
suite for one CUDA GPU, with a command of its own.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Row(NamedTuple):
    """Our figure and the peer's in the same unit; of times, the medians over `repeats` alternating runs."""

    what: str
    ours: float
    peer_name: str
    peer: float
    repeats: int
    unit: str = "s"
    target: float | None = None
    """The ratio is to be at most this."""

    @property
    def ratio(self) -> float:
        """Ours over the peer's: below 1 is faster, or less."""
        return self.ours / self.peer

    def __str__(self) -> str:
        target = "" if self.target is None else f", to be {self.target:.3g} at most"
        return f"{self.what:50} {self.ours:9.4g} {self.unit:2} {self.ratio:7.3f} x {self.peer_name}{target}"

    def record(self) -> dict[str, Any]:
        """The row in plain types."""
        return self._asdict() | {"ratio": self.ratio}


class Count(NamedTuple):
    """How often something happened to us and to the peer, over the same `rounds`."""

    what: str
    ours: int
    peer_name: str
    peer: int
    rounds: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.what:50} {self.ours:9} {self.peer:10} of {self.peer_name}{self.note and f': {self.note}'}"

    def record(self) -> dict[str, Any]:
        """The count in plain types."""
        return self._asdict()


class Point(NamedTuple):
    """What one size takes."""

    size: float
    seconds: float
    megabytes: float


class Curve(NamedTuple):
    """What grows with a size: time and memory, by how steep a line they lie on where both axes are logarithmic."""

    what: str
    against: str
    points: Sequence[Point]

    @property
    def exponents(self) -> tuple[float, float]:
        """Of time and of memory, as powers of the size."""
        size, *costs = (np.log(column) for column in zip(*self.points, strict=True))
        time, memory = (float(np.polyfit(size, cost, 1)[0]) for cost in costs)
        return time, memory

    def __str__(self) -> str:
        time, memory = self.exponents
        return f"{self.what}: time as ({self.against})^{time:.2f}, memory ^{memory:.2f}"

    def record(self) -> dict[str, Any]:
        """The curve in plain types."""
        points = [point._asdict() for point in self.points]
        return {"what": self.what, "against": self.against, "points": points, "exponents": self.exponents}


def compare(
    what: str,
    ours: Callable[[], object],
    peer_name: str,
    peer: Callable[[], object],
    repeats: int,
    warm_up: int = 1,
    target: float | None = None,
) -> Row:
    """Time both in turn, after unmeasured runs of each."""
    times: dict[Callable[[], object], list[float]] = {ours: [], peer: []}
    for repeat in range(warm_up + repeats):
        for work, taken in times.items():
            begin = time.perf_counter()
            work()
            if repeat >= warm_up:
                taken.append(time.perf_counter() - begin)
    medians = {work: statistics.median(taken) for work, taken in times.items()}
    return Row(what, medians[ours], peer_name, medians[peer], repeats, target=target)


def raised_by(work: Callable[[], object]) -> float:
    """Return by how many MB some work raises what this process holds, at its highest; where there is Linux's /proc."""
    Path("/proc/self/clear_refs").write_text("5")  # what was its highest before is forgotten
    before = _highest()
    work()
    return (_highest() - before) / 1024


def _highest() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def circumstances(*libraries: str) -> dict[str, Any]:
    """What numbers are measured on, with which versions, and of which commit."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        described = "unknown"
    return {
        "commit": described,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }
