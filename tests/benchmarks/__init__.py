"""Benchmarks: what our pieces cost beside a peer or a physical floor, measured in the same run.

A benchmark is a module here with `run(quick) -> list[Row]`; nothing else has to be done. Machines are noisy and of all
kinds, so what counts is the ratio of medians, never a time by itself.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """Our median time and the peer's, in seconds, over `repeats` alternating runs."""

    what: str
    ours: float
    peer_name: str
    peer: float
    repeats: int

    @property
    def ratio(self) -> float:
        """Ours over the peer's: below 1 is faster."""
        return self.ours / self.peer


def compare(what: str, ours: Callable[[], object], peer_name: str, peer: Callable[[], object], repeats: int) -> Row:
    """Time both in turn, after one unmeasured run of each."""
    times: dict[Callable[[], object], list[float]] = {ours: [], peer: []}
    for repeat in range(repeats + 1):
        for work, taken in times.items():
            begin = time.perf_counter()
            work()
            if repeat:
                taken.append(time.perf_counter() - begin)
    return Row(what, statistics.median(times[ours]), peer_name, statistics.median(times[peer]), repeats)
