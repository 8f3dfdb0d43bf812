"""Stanford Online Products: photographs of products on sale (Song, Xiang, Jegelka, Savarese, CVPR 2016)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hdml_core.config import DataConfig
from hdml_core.datasets.archives import Archive, fetch, identity, members
from hdml_core.datasets.base import Counts, DataError, Sample, Source
from hdml_core.datasets.cache import image_decoder

ARCHIVE = Archive(
    "Stanford_Online_Products.zip",
    address="ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
    md5="7f73d41a2f44250d4779881525aea32e",
)
EXPECTED = Counts(images=120_053, classes=22_634, train_images=59_551, train_classes=11_318)
LISTS = ("Ebay_train.txt", "Ebay_test.txt")


def read(config: DataConfig, root: Path, archive: Archive = ARCHIVE, expected: Counts = EXPECTED) -> Source:
    """Find the products; those of Ebay_train.txt train, those of Ebay_test.txt test."""
    size = config.image_size
    place = fetch(root, archive)

    def samples() -> Iterator[Sample]:
        classes = _classes(place)
        for path, content in members(place, (".jpg",)):
            name = f"{path.parent.name}/{path.name}"
            if name in classes:
                yield Sample(name, classes[name], content)

    return Source(
        name="sop",
        place=place,
        identity=[f"{size} px", *identity(place)],
        read=lambda: ((expected.images, 3, size, size), samples()),
        decode=image_decoder(size, channels=3),
        train_classes=_listed_to_train,
        expected=expected,
    )


def _classes(place: Path) -> dict[str, str]:
    """Return image -> class, "train/00001" and so on, from the rows "image_id class_id super_class_id path"."""
    lists = {path.name: content for path, content in members(place, tuple(map(str.lower, LISTS)))}
    if set(lists) != set(LISTS):
        raise DataError(f"sop must have its lists {', '.join(LISTS)}, got {sorted(lists)} in {place}: fetch it again")
    classes = {}
    for file, side in zip(LISTS, ("train", "test"), strict=True):
        for line in lists[file].decode(errors="replace").splitlines()[1:]:
            try:
                _, product, _, path = line.split()
                classes[path] = f"{side}/{int(product):05d}"
            except ValueError as error:
                raise DataError(f"a row of {file} must be three numbers and a path, got {line!r} in {place}") from error
    return classes


def _listed_to_train(classes: Sequence[str]) -> Sequence[int]:
    return [i for i, name in enumerate(classes) if name.startswith("train/")]
