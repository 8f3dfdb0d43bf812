"""The data sets: images or features with labels, split by class, decoded once into the data root.

One file per data set says where its samples come from and what its manifest must be; `cache` does the rest.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from hdml_core.config import DataConfig
from hdml_core.datasets import cars196, cub200, features, folder, glyphs, omniglot, sop
from hdml_core.datasets.base import DataError, Dataset, LabelledSet, Source, validation_fold
from hdml_core.datasets.cache import open_cached

__all__ = ["DATASETS", "DataError", "Dataset", "LabelledSet", "data_root", "load", "validation_fold"]

DATASETS: Mapping[str, Callable[[DataConfig, Path], Source]] = {
    "glyphs": glyphs.read,
    "omniglot": omniglot.read,
    "cub200": cub200.read,
    "cars196": cars196.read,
    "sop": sop.read,
    "folder": folder.read,
    "features": features.read,
}


def data_root() -> Path:
    """Return the folder that holds archives and caches: HDML_DATA, or `data` in the working directory."""
    return Path(os.environ.get("HDML_DATA", "data"))


def load(config: DataConfig, root: Path) -> Dataset:
    """Open a data set; the first time it is decoded into `root`/cache, which later calls map into memory.

    Raises DataError where its files are missing, damaged, or not what its manifest states.
    """
    return open_cached(DATASETS[config.name](config, root), root)
