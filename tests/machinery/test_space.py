"""Declarations of a space: what they may be, what they draw, what they hold."""

import json

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
    active,
    check_space,
    contains,
    ends,
    from_json,
    of_arm,
    quantile,
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

# How a network is trained, and with which of two optimisers.
CONDITIONAL = {
    "train": Choice((True, False)),
    "optimiser": Choice(("sgd", "adam"), when={"train": True}),
    "momentum": Uniform(0.0, 0.9, when={"optimiser": "sgd"}),
    "layers": Integer(1, 2),
    "width": Integer(8, 64, when={"layers": 2, "train": True}),
}
ARMED = {
    "arm": Choice(("a", "b", "c")),
    "depth": Integer(1, 3, when={"arm": ("a", "c")}),
    "width": Integer(8, 64, when={"arm": ("a",), "depth": 2}),
}


@given(st.one_of(spaces, st.sampled_from([CONDITIONAL, ARMED])), st.integers(0, 99))
def test_what_is_drawn_lies_inside(space, seed):
    check_space(space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    drawn = suggest(trial, space)
    assert contains(space, drawn)
    assert active(space, drawn) == drawn
    assert list(drawn) == [name for name in space if name in drawn]
    assert suggest(trial, space) == drawn


@given(dimensions, st.floats(0.0, 1.0))
def test_every_quantile_lies_inside(dimension, share):
    assert contains({"p": dimension}, {"p": quantile(dimension, share)})


@given(dimensions)
def test_the_first_and_last_quantile_are_the_ends(dimension):
    assert [quantile(dimension, 0.0), quantile(dimension, 1.0)] == [ends(dimension)[0], ends(dimension)[-1]]


def test_quantiles_are_even_in_a_dimensions_own_scale():
    assert [quantile(Uniform(1.0, 3.0), share) for share in (0.25, 0.5)] == [1.5, 2.0]
    assert [quantile(LogUniform(1.0, 16.0), share) for share in (0.25, 0.5)] == [2.0, 4.0]
    assert [quantile(Integer(1, 2), share) for share in (0.49, 0.5)] == [1, 2]
    assert [quantile(Choice(("a", "b", "c")), share) for share in (0.3, 0.4, 0.7)] == ["a", "b", "c"]


@given(st.one_of(spaces, st.sampled_from([CONDITIONAL, ARMED])))
def test_written_down_and_read_again_it_is_the_same(space):
    assert from_json(json.loads(json.dumps(to_json(space)))) == space
    assert widens(space, space)


@pytest.mark.parametrize(
    ("new", "old", "answer"),
    [
        (Uniform(0.0, 2.0), Uniform(0.5, 1.0), True),
        (Uniform(0.5, 1.0), Uniform(0.0, 2.0), False),
        (Uniform(1.0, 2.0), LogUniform(1.0, 2.0), False),
        (Integer(0, 5), Integer(1, 4), True),
        (Choice(("a", "b")), Choice(("a",)), False),
        (Uniform(0.0, 2.0, when={"q": 1}), Uniform(0.5, 1.0, when={"q": 1}), True),
        (Uniform(0.0, 2.0), Uniform(0.5, 1.0, when={"q": 1}), False),
        (Uniform(0.0, 2.0, when={"q": 1}), Uniform(0.5, 1.0), False),
        (Choice(("a",), when={"q": 1}), Choice(("a",)), False),
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
    assert not contains(space, {"p": 2.0})
    assert not contains({"n": Integer(1, 4)}, {"n": 2.5})


@pytest.mark.parametrize(
    ("point", "searched", "inside"),
    [
        ({"train": False, "layers": 1}, "train layers", True),
        ({"train": False, "optimiser": "sgd", "momentum": 9.0, "layers": 2, "width": 9}, "train layers", True),
        ({"train": True, "optimiser": "adam", "momentum": 9.0, "layers": 1}, "train optimiser layers", True),
        ({"train": True, "optimiser": "adam", "layers": 2, "width": 9}, "train optimiser layers width", True),
        ({"train": True, "optimiser": "adam", "layers": 2, "width": 99}, "train optimiser layers width", False),
        ({"train": True, "optimiser": "adam", "layers": 2}, "train optimiser layers", False),
        ({"train": True, "momentum": 0.5, "layers": 1}, "train layers", False),
    ],
)
def test_only_settings_that_are_active_matter(point, searched, inside):
    assert active(CONDITIONAL, {**point, "seed": 3}) == {name: point[name] for name in searched.split()}
    assert contains(CONDITIONAL, point) is inside


def test_what_is_searched_of_one_arm_is_a_space_of_its_own():
    assert of_arm(ARMED, "a") == {"depth": Integer(1, 3), "width": Integer(8, 64, when={"depth": 2})}
    assert of_arm(ARMED, "b") == {}
    assert of_arm(ARMED, "c").keys() == {"depth"}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            {"p": Integer(1, 2, when={"q": "a"}), "q": Choice(("a", "b"))},
            r"p is searched when q is 'a', which must be searched before it: before it stand \[\]",
        ),
        (
            {"q": Choice(("a", "b")), "p": Integer(1, 2, when={"q": "c"})},
            r"when q is 'c', .* that a Choice or an Integer takes: q is Choice\(values=\('a', 'b'\), when={}\)",
        ),
        ({"q": Integer(1, 3), "p": Integer(1, 2, when={"q": 4})}, "p is searched when q is 4"),
        ({"arm": Choice(("a", "b")), "p": Integer(1, 2, when={"arm": ("a", "z")})}, "p is searched when arm is 'z'"),
        ({"q": Uniform(0.0, 3.0), "p": Integer(1, 2, when={"q": 1.0})}, "p is searched when q is 1.0"),
    ],
)
def test_a_condition_that_no_search_meets_is_refused(space, says):
    with pytest.raises(ConfigError, match=says):
        check_space(space)
