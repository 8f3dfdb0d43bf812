"""What a data set is: rows with labels, cut by class, so that no class is on both sides of a split."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

Kind = Literal["images", "features"]


class DataError(ValueError):
    """Data that are missing, damaged or not what they should be. The message names the way out."""


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Some rows of a data set and their labels 0..k-1. The values are those of the whole data set, never copied."""

    values: UInt8[np.ndarray, "m c h w"] | Float32[np.ndarray, "m v f"]
    """A memory map: images, or v feature vectors of each row (v = 1 unless there are several views)."""
    rows: Int64[np.ndarray, " s"]
    """Which rows of `values` belong to this set."""
    labels: Int64[np.ndarray, " s"]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def feature_size(self) -> int | None:
        """Size f of a row that is features already; None for images."""
        return self.values.shape[2] if self.values.ndim == 3 else None

    def subset(self, classes: Sequence[int]) -> "LabelledSet":
        """Return the rows of these classes alone, relabelled 0, 1, ... in the order given."""
        new_label = np.full(self.num_classes, -1)
        new_label[list(classes)] = np.arange(len(classes))
        labels = new_label[self.labels]
        kept = labels >= 0
        return LabelledSet(self.values, self.rows[kept], labels[kept], tuple(self.classes[i] for i in classes))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two sets without a common class.

    `digest` is the SHA-256 of every row's name, class and content as found, row after row: the same digest and size
    of image are the same `values`.
    """

    name: str
    digest: str
    train: LabelledSet
    test: LabelledSet
    kind: Kind


def validation_fold(train: LabelledSet, folds: int, fold: int) -> tuple[LabelledSet, LabelledSet]:
    """Split the training classes into (the rest, the validation classes): class i validates in fold i % folds.

    Raises DataError where a side would have fewer than two classes, or share a class or a row with the other.
    """
    classes = np.arange(train.num_classes)
    validates = classes % folds == fold
    rest, validation = train.subset(classes[~validates].tolist()), train.subset(classes[validates].tolist())
    if min(rest.num_classes, validation.num_classes) < 2:
        raise DataError(
            f"data.folds must leave each side of a fold two classes or more, got {folds} folds of "
            f"{train.num_classes} classes"
        )
    demand_disjoint(rest, validation)
    return rest, validation


def demand_disjoint(one: LabelledSet, other: LabelledSet) -> None:
    """Raise DataError where two sets share a class or a row: tuning would see what it is later judged by."""
    classes = set(one.classes) & set(other.classes)
    rows = np.intersect1d(one.rows, other.rows)
    if classes or len(rows):
        raise DataError(f"two sets must share no class and no row, got classes {sorted(classes)}, rows {rows.tolist()}")


class Sample(NamedTuple):
    """One row as a reader finds it: for images the bytes of the image file, for features those of float32."""

    name: str
    class_name: str
    content: bytes


class Counts(NamedTuple):
    """How many rows and classes a published data set has, in all and on its training side."""

    images: int
    classes: int
    train_images: int
    train_classes: int


def first_half(classes: Sequence[str]) -> Sequence[int]:
    """Train on the first half of the classes; where they are odd in number, the middle one trains too."""
    return range((len(classes) + 1) // 2)


@dataclass(frozen=True)
class Source:
    """What a reader found and how to read it; nothing is read until the cache asks."""

    name: str
    place: Path
    """Where it was found, for complaints."""
    identity: Sequence[str]
    """Changes whenever the files do, or the size that they are decoded to."""
    read: Callable[[], tuple[tuple[int, ...], Iterator[Sample]]]
    """The shape of all values, (m, c, h, w) or (m, v, f), and each sample once, in the order in which they lie."""
    decode: Callable[[bytes], np.ndarray]
    """From the content of a sample to its row of values."""
    train_classes: Callable[[Sequence[str]], Sequence[int]] = first_half
    """Which of the sorted classes train; the others test."""
    expected: Counts | None = None
    kind: Kind = "images"
