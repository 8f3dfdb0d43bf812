"""What a data set is: rows with labels, cut by class, so that no class is on both sides of a split."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64, Shaped, UInt8
from torch import Tensor

Kind = Literal["images", "features", "activations"]
_Array = np.ndarray | Tensor


class DataError(ValueError):
    """Data that are missing, damaged or not what they should be. The message names the way out."""


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Some rows of a data set and their labels 0..k-1. The values are those of the whole data set."""

    values: UInt8[_Array, "m c h w"] | Float32[_Array, "m v f"] | Float32[_Array, "m v c h w"]
    """A memory map: images, or of each row v feature vectors or v blocks of an extractor's activations, one a view.
    Where the rows have been put `on` a device, a tensor there, of these rows alone."""
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
    def nbytes(self) -> int:
        """What the values of these rows take."""
        return len(self) * self.values[:1].nbytes

    @property
    def kind(self) -> Kind:
        """What a row is, told by its axes."""
        kinds: dict[int, Kind] = {4: "images", 3: "features", 5: "activations"}
        return kinds[self.values.ndim]

    @property
    def feature_size(self) -> int | None:
        """Size f of a row that is features already; None for images and activations."""
        return self.values.shape[2] if self.kind == "features" else None

    def subset(self, classes: Sequence[int]) -> "LabelledSet":
        """Return the rows of these classes alone, relabelled 0, 1, ... in the order given."""
        new_label = np.full(self.num_classes, -1)
        new_label[list(classes)] = np.arange(len(classes))
        labels = new_label[self.labels]
        kept = labels >= 0
        names = tuple(self.classes[i] for i in classes)
        return replace(self, rows=self.rows[kept], labels=labels[kept], classes=names)

    def take(
        self, positions: Int[np.ndarray, " b"], device: torch.device | str, views: Int[np.ndarray, " b"] | None = None
    ) -> Shaped[Tensor, "b ..."]:
        """Return the values at these positions on `device`, of several views the one that is named for each.

        A GPU takes them from page-locked memory: the host goes on, and the GPU with what it was at.
        """
        index = (self.rows[positions],) if views is None else (self.rows[positions], views)
        if isinstance(self.values, np.ndarray):
            taken = torch.from_numpy(self.values[index])
            pinned = taken.pin_memory() if torch.device(device).type == "cuda" else taken
            return pinned.to(device, non_blocking=True)
        return self.values[tuple(torch.from_numpy(part).to(self.values.device, non_blocking=True) for part in index)]

    def on(self, device: torch.device | str) -> "LabelledSet":
        """Return these rows with a copy of their values on `device`: the same bitwise, and no step waits for them."""
        everything = np.arange(len(self))
        # Not through page-locked memory, which would be kept.
        return replace(self, values=self.take(everything, "cpu").to(device), rows=everything)


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
    image_side: int | None = None
    """Median of the shorter sides of the images as they were found, in pixels; None where there are none."""

    @property
    def kind(self) -> Kind:
        return self.train.kind


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
