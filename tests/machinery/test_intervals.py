"""Intervals against scipy's own, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from studies.machinery.intervals import Interval, interval, paired

VALUES = st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda values: np.ptp(values) > 1e-6)


@given(VALUES)
def test_it_is_the_t_interval(values):
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)


def test_by_hand():
    # s = 0.01, t(0.975, 2) = 4.302653
    assert interval([0.1, 0.11, 0.12]).half_width == pytest.approx(4.302653 * 0.01 / math.sqrt(3))


def test_one_value_has_no_spread():
    assert interval([0.5]) == Interval(0.5, None, 1)


def test_a_difference_is_paired_over_the_seeds_that_both_have():
    ours, theirs = {1: 0.3, 2: 0.5, 3: 0.9}, {2: 0.4, 1: 0.1, 4: 0.0}
    found = paired(ours, theirs)
    assert found.n == 2
    assert found.mean == pytest.approx(0.15)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 1) * 0.05)
    assert paired(ours, {4: 0.1}) is None
