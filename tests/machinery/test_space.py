"""Declarations of a space: what they may be, what they draw, what they hold."""

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.config import ConfigError
from studies.machinery.space import (
    Choice,
    Integer,
    LogUniform,
    Uniform,
    contains,
    from_json,
    suggest,
    to_json,
    widens,
)

low_high = st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)).filter(lambda ends: ends[1] > ends[0] * 1.01)
dimensions = st.one_of(
    low_high.map(lambda ends: Uniform(*ends)),
    low_high.map(lambda ends: LogUniform(*ends)),
    st.tuples(st.integers(-9, 0), st.integers(1, 9)).map(lambda ends: Integer(*ends)),
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True).map(lambda values: Choice(tuple(values))),
)
spaces = st.dictionaries(st.sampled_from(["p", "q", "r"]), dimensions)


@given(spaces)
def test_what_is_drawn_lies_inside(space):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    drawn = suggest(trial, space)
    assert contains(space, drawn)
    assert suggest(trial, space) == drawn


@given(spaces)
def test_written_down_and_read_again_it_is_the_same(space):
    assert from_json(to_json(space)) == space
    assert widens(space, space)


@pytest.mark.parametrize(
    ("new", "old", "answer"),
    [
        (Uniform(0.0, 2.0), Uniform(0.5, 1.0), True),
        (Uniform(0.5, 1.0), Uniform(0.0, 2.0), False),
        (Uniform(1.0, 2.0), LogUniform(1.0, 2.0), False),
        (Integer(0, 5), Integer(1, 4), True),
        (Choice(("a", "b")), Choice(("a",)), False),
    ],
)
def test_widening(new, old, answer):
    assert widens({"p": new}, {"p": old}) is answer
    assert not widens({"p": new}, {"q": old})


@pytest.mark.parametrize(
    ("kind", "ends", "rule"),
    [
        (Uniform, (1.0, 1.0), "Uniform must have low < high"),
        (Uniform, (0.0, float("inf")), "both finite"),
        (LogUniform, (0.0, 1.0), "LogUniform must have low > 0, got 0.0"),
        (Integer, (3, 2), r"Integer must have low < high, both finite, got \(3, 2\)"),
        (Choice, ((),), "Choice must have at least one value"),
    ],
)
def test_an_impossible_range_is_refused(kind, ends, rule):
    with pytest.raises(ConfigError, match=rule):
        kind(*ends)


def test_a_point_outside_is_seen():
    space = {"p": LogUniform(1.0, 10.0), "q": Choice(("a",))}
    assert not contains(space, {"p": 11.0, "q": "a"})
    assert not contains(space, {"p": 2.0, "q": "b"})
