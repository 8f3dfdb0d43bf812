"""Splits by class: complete, disjoint, relabelled 0..k-1."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.datasets import DataError, LabelledSet, validation_fold
from hdml_core.datasets.base import demand_disjoint, first_half


def labelled(labels: list[int]) -> LabelledSet:
    """A set whose every label 0..k-1 occurs; its rows are every other row of the values."""
    classes, contiguous = np.unique(labels, return_inverse=True)
    values = np.zeros((2 * len(labels), 1, 2, 2), np.uint8)
    names = tuple(f"class {i}" for i in classes)
    return LabelledSet(values, 2 * np.arange(len(labels)), contiguous.astype(np.int64), names)


many_labels = st.lists(st.integers(0, 12), min_size=30, max_size=80).filter(lambda labels: len(set(labels)) >= 8)


def names(part: LabelledSet) -> dict[int, str]:
    return {int(row): part.classes[label] for row, label in zip(part.rows, part.labels, strict=True)}


@given(many_labels, st.integers(2, 4), st.data())
def test_a_fold_and_the_rest_are_disjoint_and_complete(labels, folds, data):
    train = labelled(labels)
    rest, validation = validation_fold(train, folds, data.draw(st.integers(0, folds - 1)))
    assert not set(rest.classes) & set(validation.classes)
    assert not set(rest.rows) & set(validation.rows)
    assert names(rest) | names(validation) == names(train)
    for part in (rest, validation):
        assert part.values is train.values
        assert np.array_equal(np.unique(part.labels), np.arange(part.num_classes))


@given(many_labels, st.integers(2, 4))
def test_each_class_validates_once(labels, folds):
    train = labelled(labels)
    validating = [validation_fold(train, folds, fold)[1].classes for fold in range(folds)]
    assert sorted(name for classes in validating for name in classes) == sorted(train.classes)
    assert validating == [train.classes[fold::folds] for fold in range(folds)]


def test_a_subset_is_relabelled_in_the_order_given():
    whole = labelled([0, 1, 2, 1, 0])
    part = whole.subset([2, 0])
    assert part.classes == ("class 2", "class 0")
    assert part.rows.tolist() == [0, 4, 8]
    assert part.labels.tolist() == [1, 0, 1]
    assert len(part) == 3
    assert part.num_classes == 2


@pytest.mark.parametrize("views", [None, [2, 0, 1, 1]])
def test_rows_put_on_a_device_are_the_same(views):
    whole = labelled([0, 1, 2, 1, 0])
    if views:
        whole = replace(whole, values=np.random.default_rng(0).random((10, 3, 7), np.float32))
        views = np.array(views)
    positions = np.array([3, 0, 0, 2])
    wanted = whole.subset([0, 1]).take(positions, "cpu", views)
    resident = whole.on("cpu")
    assert isinstance(resident.values, torch.Tensor)
    assert len(resident.values) == len(resident)
    assert resident.nbytes == whole.nbytes == np.asarray(resident.values).nbytes
    assert (resident.kind, resident.feature_size) == (whole.kind, whole.feature_size)
    for part in (resident, resident.on("cpu")):
        taken = part.subset([0, 1]).take(positions, "cpu", views)
        assert taken.dtype == wanted.dtype
        assert torch.equal(taken, wanted)


def test_a_fold_of_one_class_is_refused():
    with pytest.raises(DataError, match="data.folds must leave each side .* got 5 folds of 6 classes"):
        validation_fold(labelled([0, 1, 2, 3, 4, 5]), folds=5, fold=3)


def test_a_shared_class_and_a_shared_row_are_refused():
    whole = labelled([0, 0, 1, 1, 2, 2])
    demand_disjoint(whole.subset([0]), whole.subset([1, 2]))
    with pytest.raises(DataError, match=r"classes \['class 1'\], rows \[4, 6\]"):
        demand_disjoint(whole.subset([0, 1]), whole.subset([1, 2]))


def test_the_middle_class_trains():
    assert list(first_half("abcde")) == [0, 1, 2]
    assert list(first_half("abcd")) == [0, 1]
