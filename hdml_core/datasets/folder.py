"""The user's own images: one folder per class."""

from collections.abc import Iterator
from pathlib import Path

from hdml_core.config import DataConfig
from hdml_core.datasets.archives import identity
from hdml_core.datasets.base import DataError, Sample, Source
from hdml_core.datasets.cache import image_decoder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read(config: DataConfig, root: Path) -> Source:
    """Find the images under data.path; the first half of the sorted classes trains.

    A class is a folder that holds images, its name the path below data.path. Raises DataError where there is none,
    or where an image lies in no class folder.
    """
    size = config.image_size
    place = Path(config.path).expanduser()
    if not config.path or not place.is_dir():
        raise DataError(f"data.path must be a folder of class folders with images, got {config.path!r}")
    files = [file for file in sorted(place.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not files:
        raise DataError(f"data.path must hold images ({' '.join(SUFFIXES)}) in class folders, got none in {place}")
    if strays := [file.name for file in files if file.parent == place]:
        raise DataError(f"each image of {place} must lie in the folder of its class, got {strays[0]} beside them")

    def samples() -> Iterator[Sample]:
        for file in files:
            name = file.relative_to(place)
            yield Sample(name.as_posix(), name.parent.as_posix(), file.read_bytes())

    return Source(
        name="folder",
        place=place,
        identity=[f"{size} px", str(place.resolve()), *identity(place)],
        read=lambda: ((len(files), 3, size, size), samples()),
        decode=image_decoder(size, channels=3),
    )
