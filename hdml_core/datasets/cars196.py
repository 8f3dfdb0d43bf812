"""Cars196: 196 makes, models and years of cars (Krause, Stark, Deng, Fei-Fei, 3dRR 2013)."""

import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from hdml_core.config import DataConfig
from hdml_core.datasets.archives import Archive, fetch, find, held, identity, members
from hdml_core.datasets.base import Counts, DataError, Sample, Source
from hdml_core.datasets.cache import image_decoder

GONE = "its official address is gone, so ask a colleague or a mirror"


class Part(NamedTuple):
    """An archive of images and the file that names their classes; `column` holds the names of the images."""

    images: Archive
    annotations: str
    column: str


# The set came in two forms, numbered differently: one archive with cars_annos.mat, and the two halves of a contest.
WHOLE = (Part(Archive("car_ims.tgz", note=GONE), "cars_annos.mat", "relative_im_path"),)
HALVES = (
    Part(Archive("cars_train.tgz", note=GONE), "devkit/cars_train_annos.mat", "fname"),
    Part(Archive("cars_test.tgz", note=GONE), "cars_test_annos_withlabels.mat", "fname"),
)
EXPECTED = Counts(images=16_185, classes=196, train_images=8_054, train_classes=98)


def read(config: DataConfig, root: Path, expected: Counts = EXPECTED) -> Source:
    """Find the cars; classes 1-98 train, 99-196 test. Raises DataError: there is nowhere to download them from."""
    size = config.image_size
    parts = HALVES if find(root, HALVES[0].images) else WHOLE
    places = [fetch(root, part.images) for part in parts]
    tables = [held(root, part.annotations) or root / part.annotations for part in parts]
    if missing := [table for table in tables if not table.is_file()]:
        raise DataError(f"classes of cars196 not found in {root}: put {missing[0].name} at {missing[0]}")

    def samples() -> Iterator[Sample]:
        for part, place, table in zip(parts, places, tables, strict=True):
            classes = _classes(table, part.column)
            for path, content in members(place, (".jpg",)):
                if path.name in classes:
                    yield Sample(f"{part.images.folder}/{path.name}", classes[path.name], content)

    return Source(
        name="cars196",
        place=root,
        identity=[f"{size} px", *(line for file in (*places, *tables) for line in identity(file))],
        read=lambda: ((expected.images, 3, size, size), samples()),
        decode=image_decoder(size, channels=3),
        expected=expected,
    )


def _classes(table: Path, column: str) -> dict[str, str]:
    """Return image -> class, "001" and so on."""
    try:
        annotations: Any = loadmat(table, squeeze_me=True)["annotations"]
        names, classes = annotations[column].tolist(), annotations["class"].tolist()
        return {PurePosixPath(name).name: f"{int(number):03d}" for name, number in zip(names, classes, strict=True)}
    except (
        MatReadError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise DataError(f"{table} must be a .mat file with annotations, got {error!r}: fetch it again") from error
