"""Features of any modality, made elsewhere: an .npz file with `features` and `labels`."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped

from hdml_core.config import DataConfig
from hdml_core.datasets.archives import identity
from hdml_core.datasets.base import DataError, Sample, Source


def read(config: DataConfig, root: Path) -> Source:
    """Read data.path: `features` of shape (m, f), or (m, v, f) with v views of each row, and `labels` of shape (m,).

    Labels are whole numbers or strings; the first half of the sorted labels trains. Raises DataError for a file that
    is missing, damaged or of other shapes, and for features that are not finite.
    """
    place = Path(config.path).expanduser()
    if not config.path or not place.is_file():
        raise DataError(f"data.path must be an .npz file with features and labels, got {config.path!r}")

    def samples() -> tuple[tuple[int, ...], Iterator[Sample]]:
        features, labels = _arrays(place)
        # Numbers are padded so that they sort as numbers do.
        width = len(str(labels.max())) if labels.dtype.kind in "iu" else 0
        rows = enumerate(zip(features, labels, strict=True))
        return features.shape, (Sample(str(i), str(label).zfill(width), row.tobytes()) for i, (row, label) in rows)

    return Source(
        name="features",
        place=place,
        identity=[str(place.resolve()), *identity(place)],
        read=samples,
        decode=lambda content: np.frombuffer(content, np.float32),
        kind="features",
    )


def _arrays(place: Path) -> tuple[Float32[np.ndarray, "m v f"], Shaped[np.ndarray, " m"]]:
    try:
        with place.open("rb") as file, np.load(file) as arrays:
            features, labels = arrays["features"], arrays["labels"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{place} must be an .npz file with the arrays features and labels, got {error}") from error
    if features.ndim not in (2, 3) or features.dtype.kind not in "fiu" or 0 in features.shape:
        raise DataError(
            f"features of {place} must be numbers of shape (m, f) or (m, v, f), got {features.dtype} {features.shape}"
        )
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels of {place} must be {len(features)} whole numbers or strings, got {labels.dtype} {labels.shape}"
        )
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is found below
        values = features.reshape(len(features), -1, features.shape[-1]).astype(np.float32)
    damaged = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
    if len(damaged):
        raise DataError(f"features of {place} must be finite, got {len(damaged)} rows that are not, first {damaged[0]}")
    return values, labels
