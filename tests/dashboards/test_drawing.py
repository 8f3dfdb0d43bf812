"""Figures: where values stand, and that what is drawn is whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from dashboards.curves import found
from dashboards.drawing import Scale, draw

POSITIVE = st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=20, unique=True).map(sorted)


@given(POSITIVE, st.booleans())
def test_order_is_kept_and_zero_stands_left_of_all(values, with_zero):
    scale = Scale((0.0, *values) if with_zero else tuple(values))
    places = [scale.place(value) for value in scale.values]
    assert places == sorted(places)
    if scale.logarithmic:
        assert all(place > 0 for place in places)
    assert scale.broken == (with_zero and scale.logarithmic)


def test_values_far_apart_stand_on_a_logarithmic_axis_but_for_even_steps():
    assert Scale((0.1, 1.0, 3.0)).logarithmic
    assert not Scale((0.1, 1.0, 1.9)).logarithmic
    assert not Scale(tuple(map(float, range(1, 50)))).logarithmic


def test_zero_stands_a_step_below_the_others():
    assert Scale((0.0, 1.0, 10.0, 100.0)).place(0.0) == pytest.approx(0.1)


def test_many_values_are_ticked_by_powers_of_ten():
    assert Scale((0.0, *(0.2 * 2**i for i in range(12)))).ticks() == [0.0, 1.0, 10.0, 100.0]
    assert Scale(tuple(map(float, range(20)))).ticks() == []
    assert Scale((16.0, 64.0)).ticks() == [16.0, 64.0]


def test_a_linear_axis_may_hold_anything():
    scale = Scale((-5.0, 0.0, 100.0))
    assert not scale.logarithmic
    assert scale.place(0.0) == 0.0


@pytest.mark.parametrize("study", ["alpha", "single", "ablation", "opened"])
def test_a_figure_is_written_twice_and_the_same_each_time(tracker, study, tmp_path):
    what = found(tracker, study)
    png, svg = draw(what, tmp_path / study)
    height, width, _ = imread(png).shape
    assert (width > 1000, height > 300) == (True, True)
    first = svg.read_bytes()
    draw(what, tmp_path / study)
    assert svg.read_bytes() == first
