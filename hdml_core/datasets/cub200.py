"""CUB-200-2011: 200 species of birds (Wah, Branson, Welinder, Perona, Belongie, Caltech, 2011)."""

from collections.abc import Iterator
from pathlib import Path

from hdml_core.config import DataConfig
from hdml_core.datasets.archives import Archive, fetch, identity, members
from hdml_core.datasets.base import Counts, Sample, Source
from hdml_core.datasets.cache import image_decoder

ARCHIVE = Archive(
    "CUB_200_2011.tgz",
    address="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    md5="97eceeb196236b17998738112f37df78",
)
EXPECTED = Counts(images=11_788, classes=200, train_images=5_864, train_classes=100)


def read(config: DataConfig, root: Path, archive: Archive = ARCHIVE, expected: Counts = EXPECTED) -> Source:
    """Find the birds; species 1-100 train, 101-200 test."""
    size = config.image_size
    place = fetch(root, archive)

    def samples() -> Iterator[Sample]:
        for path, content in members(place, (".jpg",)):
            species = path.parent.name
            yield Sample(f"{species}/{path.name}", species, content)

    return Source(
        name="cub200",
        place=place,
        identity=[f"{size} px", *identity(place)],
        read=lambda: ((expected.images, 3, size, size), samples()),
        decode=image_decoder(size, channels=3),
        expected=expected,
    )
