"""Decode once: every row of a data set goes into one .npy file under the data root, and is memory-mapped from there.

Beside it stands a JSON file with digest, classes and labels. It is written last: where it is, the rows are.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from hdml_core.datasets.base import Counts, DataError, Dataset, Kind, LabelledSet, Sample, Source, demand_disjoint
from hdml_core.datasets.locks import locked

Manifest = dict[str, Any]
DTYPES: dict[Kind, np.dtype[Any]] = {"images": np.dtype(np.uint8), "features": np.dtype(np.float32)}
CHUNK = 256


def image_decoder(size: int, channels: int, invert: bool = False) -> Callable[[bytes], UInt8[np.ndarray, "c h w"]]:
    """Return a function from an image file's bytes to a square of `size`, squashed by antialiased bilinear filter."""

    def decode(content: bytes) -> UInt8[np.ndarray, "c h w"]:
        with Image.open(io.BytesIO(content)) as file:
            image = file.convert("RGB" if channels == 3 else "L").resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(ImageOps.invert(image) if invert else image)
        return np.ascontiguousarray(pixels.reshape(size, size, channels).transpose(2, 0, 1))

    return decode


def open_cached(source: Source, root: Path) -> Dataset:
    """Memory-map the rows of a source, after decoding them if that has not been done.

    Of several processes that ask at once, one decodes and the others wait. Raises DataError for damaged files, wrong
    counts, a class of fewer than two rows, no space, a data root that can't be written.
    """
    key = hashlib.sha256("\n".join(source.identity).encode()).hexdigest()[:12]
    rows_file, manifest_file = (root / "cache" / f"{source.name}-{key}.{ending}" for ending in ("npy", "json"))
    if not manifest_file.exists():
        with locked(manifest_file.with_suffix(".lock")):
            if not manifest_file.exists():
                _prepare(source, rows_file, manifest_file)
    return _split(source, rows_file, json.loads(manifest_file.read_text()))


def _split(source: Source, rows_file: Path, manifest: Manifest) -> Dataset:
    """Map the rows and cut them by class, demanding what must hold of the two sides."""
    values = np.load(rows_file, mmap_mode="r")
    whole = LabelledSet(values, np.arange(len(values)), np.array(manifest["labels"]), tuple(manifest["classes"]))
    train_classes = list(source.train_classes(whole.classes))
    test_classes = sorted(set(range(whole.num_classes)) - set(train_classes))
    train, test = whole.subset(train_classes), whole.subset(test_classes)
    found = Counts(len(whole), whole.num_classes, len(train), train.num_classes)
    if source.expected not in (None, found):
        raise DataError(f"{source.name} must have {source.expected}, got {found} in {source.place}: fetch it again")
    if min(train.num_classes, test.num_classes) < 2:
        raise DataError(
            f"{source.name} must have two classes or more to train on and two to test on, got "
            f"{train.num_classes} and {test.num_classes} in {source.place}"
        )
    rows_per_class = np.bincount(whole.labels)
    if rows_per_class.min() < 2:
        lonely = whole.classes[rows_per_class.argmin()]
        raise DataError(
            f"each class of {source.name} must have two rows or more, got one of {lonely!r} in {source.place}: add "
            "another or take the class out"
        )
    demand_disjoint(train, test)
    return Dataset(source.name, manifest["digest"], train, test, manifest.get("image_side"))


def _prepare(source: Source, rows_file: Path, manifest_file: Path) -> None:
    """Write both files aside, check them, and only then give them their names."""
    rows_aside, manifest_aside = (path.with_name(f"{path.name}.part") for path in (rows_file, manifest_file))
    try:
        manifest = _write_rows(source, rows_aside)
        _split(source, rows_aside, manifest)
        with manifest_aside.open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        rows_aside.rename(rows_file)
        manifest_aside.rename(manifest_file)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"no space left in {rows_file.parent}: free some, or set HDML_DATA elsewhere") from error
    finally:
        rows_aside.unlink(missing_ok=True)
        manifest_aside.unlink(missing_ok=True)


def _write_rows(source: Source, path: Path) -> Manifest:
    shape, samples = source.read()
    dtype = DTYPES[source.kind]
    needed, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"no space left in {path.parent}: {source.name} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
            "free: free some, or set HDML_DATA elsewhere"
        )
    class_names: list[str] = []
    sides: list[int] = []
    digest = hashlib.sha256()
    # Written, not mapped: a disk that fills up is an error here, and would kill the process there.
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        with tqdm(desc=f"decoding {source.name}", total=shape[0], unit="row", disable=None) as bar:
            for sample, row in _decoded(source, samples):
                file.write(row.tobytes())
                class_names.append(sample.class_name)
                if source.kind == "images":
                    with Image.open(io.BytesIO(sample.content)) as image:
                        sides.append(min(image.size))
                digest.update(repr((sample.name, sample.class_name, len(sample.content))).encode() + sample.content)
                bar.update()
        file.flush()
        os.fsync(file.fileno())
    if len(class_names) != shape[0]:
        raise DataError(
            f"{source.name} must have {shape[0]} rows, got {len(class_names)} in {source.place}: fetch it again"
        )
    classes, labels = np.unique(class_names, return_inverse=True)
    found = {"digest": digest.hexdigest(), "classes": classes.tolist(), "labels": labels.tolist()}
    return found | ({"image_side": int(np.median(sides))} if sides else {})


def _decoded(source: Source, samples: Iterator[Sample]) -> Iterator[tuple[Sample, np.ndarray]]:
    def decode(sample: Sample) -> tuple[Sample, np.ndarray]:
        try:
            return sample, source.decode(sample.content)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            state = "can't be decoded" if sample.content else "is empty"
            raise DataError(f"{sample.name} in {source.place} {state} ({error}): replace it or take it out") from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(samples, CHUNK)):
            yield from pool.map(decode, chunk)
