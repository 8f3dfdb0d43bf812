"""Batches are laid out by role, are a function of (seed, epoch), and are uniform."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.config import ConfigError
from hdml_core.sampling import CLASSES_PER_TUPLE, ROWS_PER_TUPLE, RoleBatches

LAYOUTS = ("pairs", "triplets")


@st.composite
def cases(draw):
    """Shuffled labels, a layout, and a batch size that they have the classes for."""
    layout = draw(st.sampled_from(LAYOUTS))
    counts = draw(st.lists(st.integers(2, 6), min_size=CLASSES_PER_TUPLE[layout], max_size=12))
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.repeat(np.arange(len(counts)), counts))
    tuples = draw(st.integers(1, len(counts) // CLASSES_PER_TUPLE[layout]))
    return labels, layout, tuples * ROWS_PER_TUPLE[layout]


def equal(batches, others):
    return all(np.array_equal(batch, other) for batch, other in zip(batches, others, strict=True))


@given(case=cases(), epoch=st.integers(0, 1000))
def test_tuples_are_as_the_layout_says(case, epoch):
    labels, layout, batch_size = case
    for rows in RoleBatches(*case, steps=3, seed=1).epoch(epoch):
        assert len(rows) == batch_size
        anchors, positives, *negatives = np.split(rows, ROWS_PER_TUPLE[layout])
        assert np.array_equal(labels[anchors], labels[positives])
        assert (anchors != positives).all()
        classes = np.concatenate([labels[anchors], *(labels[role] for role in negatives)])
        assert len(np.unique(classes)) == len(classes) == len(anchors) * CLASSES_PER_TUPLE[layout]
        assert len(np.unique(rows)) == batch_size


@given(case=cases(), epoch=st.integers(0, 1000), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_function_of_seed_and_epoch(case, epoch, seed):
    fresh = RoleBatches(*case, steps=2, seed=seed)
    resumed = RoleBatches(*case, steps=2, seed=seed)
    list(resumed.epoch(epoch + 1))
    assert equal(fresh.epoch(epoch), resumed.epoch(epoch))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_seeds_and_epochs_draw_other_batches(layout):
    labels = np.arange(200).repeat(10)
    first = [RoleBatches(labels, layout, 60, 1, seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    drawn = {tuple(rows) for batches in first for rows in batches}
    assert len(drawn) == 4


@pytest.mark.parametrize(("rows", "steps"), [(600, 20), (601, 21), (40, 2)])
def test_an_epoch_draws_as_many_rows_as_there_are(rows, steps):
    batches = RoleBatches(np.arange(rows) % 20, "pairs", batch_size=30, steps=0, seed=0)
    assert len(list(batches.epoch(0))) == steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_and_their_pairs_of_rows_are_uniform(layout):
    """Of 6 classes of 3 rows: every ordered pair of rows equally often, within five standard deviations."""
    labels = np.arange(6).repeat(3)
    draws = 6000
    batches = RoleBatches(labels, layout, ROWS_PER_TUPLE[layout], draws, seed=0)
    roles = np.stack(list(batches.epoch(0))).T

    def all_alike(outcomes, possible):
        counts = [outcomes.count(outcome) for outcome in possible]
        expected = draws / len(possible)
        assert sum(counts) == draws
        assert np.abs(np.array(counts) - expected).max() < 5 * np.sqrt(expected)

    of_class = [itertools.permutations(range(3 * c, 3 * c + 3), 2) for c in range(6)]
    all_alike(list(map(tuple, roles[:2].T.tolist())), [pair for pairs in of_class for pair in pairs])
    if layout == "triplets":
        all_alike(roles[2].tolist(), range(18))


@pytest.mark.parametrize(
    ("layout", "batch_size", "message"),
    [
        (
            "pairs",
            22,
            "data.batch_size must be <= 20, got 22: its 11 pairs need 11 classes and the training set has 10",
        ),
        (
            "triplets",
            18,
            "data.batch_size must be <= 15, got 18: its 6 triplets need 12 classes and the training set has 10",
        ),
    ],
)
def test_too_few_classes_are_refused(layout, batch_size, message):
    with pytest.raises(ConfigError) as error:
        RoleBatches(np.arange(10).repeat(4), layout, batch_size, 1, seed=0)
    assert str(error.value) == message


def test_as_many_classes_as_needed_will_do():
    RoleBatches(np.arange(10).repeat(4), "pairs", 20, 1, seed=0)
    RoleBatches(np.arange(10).repeat(4), "triplets", 15, 1, seed=0)
