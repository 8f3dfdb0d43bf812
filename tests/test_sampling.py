"""Batches are laid out by role, are a pure function of seed and epoch, and are shared out without overlap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.config import ConfigError
from hdml_core.sampling import RoleBatches

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(12), [2, 3, 4, 5] * 3))


def batches(layout, batch_size=12, steps=5, seed=0, **share):
    return RoleBatches(LABELS, layout, batch_size, steps, seed, **share)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_pairs_are_two_rows_of_each_of_n_classes(seed, epoch):
    for rows in batches("pairs", seed=seed).epoch(epoch):
        first, second = LABELS[rows[:6]], LABELS[rows[6:]]
        assert (first == second).all()
        assert len(set(first)) == 6
        assert (rows[:6] != rows[6:]).all()


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_triplets_have_negatives_of_other_classes(seed, epoch):
    for rows in batches("triplets", seed=seed).epoch(epoch):
        anchor, positive, negative = LABELS[rows].reshape(3, 4)
        assert (anchor == positive).all()
        assert (rows[:4] != rows[4:8]).all()
        assert len({*anchor, *negative}) == 8


@pytest.mark.parametrize("layout", ["pairs", "triplets"])
def test_an_epoch_is_a_function_of_seed_and_epoch(layout):
    once, again = ([*batches(layout).epoch(3)] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, [*batches(layout).epoch(4)])
    assert not np.array_equal(once, [*batches(layout, seed=1).epoch(3)])


@pytest.mark.parametrize("layout", ["pairs", "triplets"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_batch(layout, world):
    size = {"pairs": 8, "triplets": 12}[layout]
    whole = [*batches(layout, size).epoch(0)]
    shares = zip(*(batches(layout, size, rank=rank, world=world).epoch(0) for rank in range(world)), strict=True)
    for rows, of_ranks in zip(whole, shares, strict=True):
        by_role = [share.reshape(-1, 4 // world) for share in of_ranks]
        np.testing.assert_array_equal(np.concatenate(by_role, axis=1).flatten(), rows)


def test_every_row_is_drawn_alike_within_its_class():
    counts = np.zeros(len(LABELS))
    for rows in batches("pairs", steps=4000).epoch(0):
        counts[rows] += 1
    by_class = counts / 4000 * np.bincount(LABELS)[LABELS]
    np.testing.assert_allclose(by_class, 2 * 6 / 12, rtol=0.15)


def test_an_epoch_draws_as_many_rows_as_there_are():
    assert len([*batches("pairs", steps=0).epoch(0)]) == -(-len(LABELS) // 12)


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [
        ("pairs", 26, "must be <= 24, got 26: its 13 pairs need 13 classes and the training set has 12"),
        ("triplets", 21, "must be <= 18, got 21: its 7 triplets need 14 classes and the training set has 12"),
    ],
)
def test_too_few_classes(layout, size, message):
    with pytest.raises(ConfigError, match=message):
        batches(layout, size)


def test_tuples_that_do_not_share_out():
    with pytest.raises(ConfigError, match="data.batch_size 12: 6 tuples do not share out over 4"):
        batches("pairs", world=4)
