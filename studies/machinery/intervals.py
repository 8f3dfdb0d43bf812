"""Means with their 95 % t-intervals, and differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.stats import t as student

Key = TypeVar("Key")


class Interval(NamedTuple):
    """A mean with its 95 % interval by Student's t, mean +- half_width, over n values."""

    mean: float
    half_width: float | None
    """None of a single value: it has no spread."""
    n: int

    def __str__(self) -> str:
        """In per cent.

        >>> str(Interval(0.24149, 0.0046, 5)), str(Interval(0.2478, None, 1))
        ('24.15 ± 0.46', '24.78')
        """
        mean = f"{100 * self.mean:.2f}"
        return mean if self.half_width is None else f"{mean} ± {100 * self.half_width:.2f}"


def interval(values: Sequence[float]) -> Interval:
    """Return mean and half width t(0.975, n - 1) s / sqrt(n); s is the sample's standard deviation."""
    n = len(values)
    half_width = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return Interval(float(np.mean(values)), half_width, n)


def paired(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> Interval | None:
    """Return the interval of ours - theirs over the seeds that both have; None where they share none."""
    shared = [seed for seed in ours if seed in theirs]
    return interval([ours[seed] - theirs[seed] for seed in shared]) if shared else None
