"""Decoded once, whole or not at all, by one process while the others wait; what is wrong is named."""

import errno
import io
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hdml_core.datasets import DataError
from hdml_core.datasets.base import Counts, Sample, Source
from hdml_core.datasets.cache import image_decoder, open_cached
from hdml_core.datasets.locks import locked
from tests.datasets.made import image_file


def source(place, images=None, **changes):
    """Four classes of two images, counted while they are decoded."""
    if images is None:
        images = {f"{c}/{i}": image_file(10 * ord(c) + i) for c in "abcd" for i in (0, 1)}
    samples = [Sample(name, name[0], content) for name, content in images.items()]
    made = Source("made", place, ["8 px"], lambda: ((len(samples), 3, 8, 8), iter(samples)), image_decoder(8, 3))
    return replace(made, **changes)


def leftovers(root):
    return sorted(path.name for path in (root / "cache").iterdir() if path.suffix != ".lock")


def test_values_labels_and_split(tmp_path):
    dataset = open_cached(source(tmp_path), tmp_path)
    assert dataset.train.classes == ("a", "b")
    assert dataset.test.classes == ("c", "d")
    assert dataset.train.rows.tolist() == [0, 1, 2, 3]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert isinstance(dataset.train.values, np.memmap)
    assert dataset.train.values is dataset.test.values
    assert dataset.image_side == 14
    with Image.open(io.BytesIO(image_file(10 * ord("c") + 1))) as image:
        expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(dataset.test.values[5], expected)


def test_the_second_opening_decodes_nothing(tmp_path):
    first = open_cached(source(tmp_path), tmp_path)

    def refuse(*_):
        raise AssertionError("read again")

    second = open_cached(source(tmp_path, read=refuse, decode=refuse), tmp_path)
    assert second.digest == first.digest
    assert np.array_equal(second.train.values, first.train.values)


def test_another_identity_is_another_cache(tmp_path):
    open_cached(source(tmp_path), tmp_path)
    other = {f"{c}/{i}": image_file(i) for c in "abcd" for i in (0, 1)}
    changed = open_cached(source(tmp_path, other, identity=["8 px", "changed"]), tmp_path)
    assert np.array_equal(changed.train.values[0], changed.train.values[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images | {"a/0": image_file(99)},
        lambda images: {name.replace("a/0", "a/9"): content for name, content in images.items()},
        lambda images: {name.replace("d", "e"): content for name, content in images.items()},
        lambda images: dict(reversed(images.items())),
    ],
    ids=["content", "name", "class", "order"],
)
def test_the_digest_tells_every_change(tmp_path, change):
    images = {f"{c}/{i}": image_file(10 * ord(c) + i) for c in "abcd" for i in (0, 1)}
    before = open_cached(source(tmp_path, images), tmp_path).digest
    assert open_cached(source(tmp_path, change(images), identity=["changed"]), tmp_path).digest != before


def test_the_digest_does_not_depend_on_the_size(tmp_path):
    def sized(size):
        samples = source(tmp_path).read()[1]
        return source(
            tmp_path, identity=[f"{size} px"], read=lambda: ((8, 3, size, size), samples), decode=image_decoder(size, 3)
        )

    small, large = (open_cached(sized(size), tmp_path) for size in (8, 12))
    assert small.digest == large.digest
    assert large.train.values.shape == (8, 3, 12, 12)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1")]
)
def test_any_mode_becomes_three_channels_or_one(kind, mode):
    content = image_file(0, kind, mode)
    assert image_decoder(8, 3)(content).shape == (3, 8, 8)
    assert image_decoder(8, 1)(content).shape == (1, 8, 8)


def test_inverted_ink_is_bright():
    drawing = image_file(0, "PNG", "1")
    assert np.array_equal(image_decoder(8, 1, invert=True)(drawing), 255 - image_decoder(8, 1)(drawing))


BAD_IMAGES = {
    "empty": (b"", "b/1 in .* is empty"),
    "text": (b"no image", "b/1 in .* can't be decoded"),
    "cut short": (image_file(1)[:-200], "b/1 in .* can't be decoded"),
    "cut PNG": (image_file(1, "PNG")[:-300], "b/1 in .* can't be decoded"),
}


@pytest.mark.parametrize(("content", "complaint"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_a_damaged_image_is_named_and_nothing_stays(tmp_path, content, complaint):
    images = {f"{c}/{i}": image_file(i) for c in "abcd" for i in (0, 1)} | {"b/1": content}
    with pytest.raises(DataError, match=complaint):
        open_cached(source(tmp_path, images), tmp_path)
    assert leftovers(tmp_path) == []
    assert open_cached(source(tmp_path), tmp_path).name == "made"


@pytest.mark.parametrize("stated", [7, 9])
def test_too_few_and_too_many_rows(tmp_path, stated):
    samples = source(tmp_path).read()[1]
    with pytest.raises(DataError, match=f"made must have {stated} rows, got 8 in {tmp_path}"):
        open_cached(source(tmp_path, read=lambda: ((stated, 3, 8, 8), samples)), tmp_path)
    assert leftovers(tmp_path) == []


def test_other_counts_than_published(tmp_path):
    published = Counts(images=8, classes=4, train_images=4, train_classes=2)
    open_cached(source(tmp_path, expected=published), tmp_path)
    with pytest.raises(DataError, match=r"made must have Counts\(.*train_images=5.*got Counts\(.*train_images=4"):
        open_cached(source(tmp_path, expected=published._replace(train_images=5)), tmp_path)


def test_a_class_of_one_row(tmp_path):
    images = {name: image_file(0) for name in ("a/0", "a/1", "b/0", "b/1", "c/0", "d/0", "d/1")}
    with pytest.raises(DataError, match="each class of made must have two rows or more, got one of 'c'"):
        open_cached(source(tmp_path, images), tmp_path)
    assert leftovers(tmp_path) == []


def test_a_side_of_one_class(tmp_path):
    images = {f"{c}/{i}": image_file(i) for c in "abc" for i in (0, 1)}
    with pytest.raises(DataError, match="two classes or more to train on and two to test on, got 2 and 1"):
        open_cached(source(tmp_path, images), tmp_path)


def test_too_little_space_is_told_before_the_first_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(DataError, match="no space left in .*made needs 0.00 GB"):
        open_cached(source(tmp_path), tmp_path)
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no space left in .*HDML_DATA"):
        open_cached(source(tmp_path), tmp_path)
    assert leftovers(tmp_path) == []


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cache must be writable.*HDML_DATA.*symbolic links"):
        open_cached(source(tmp_path), tmp_path)


def test_of_many_at_once_one_decodes(tmp_path):
    read, readings = source(tmp_path).read, []

    def counted():
        readings.append(1)
        return read()

    shared = source(tmp_path, read=counted)
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: open_cached(shared, tmp_path), range(4)))
    assert len(readings) == 1
    assert len({dataset.digest for dataset in datasets}) == 1


def test_a_lock_dies_with_its_holder(tmp_path):
    script = f"""
import os
from pathlib import Path
from hdml_core.datasets.locks import locked
with locked(Path({str(tmp_path / "lock")!r})):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with locked(tmp_path / "lock"):
        pass


def test_what_a_killed_process_left_is_written_over(tmp_path):
    first = open_cached(source(tmp_path), tmp_path)
    [rows] = (tmp_path / "cache").glob("*.npy")
    rows.with_suffix(".json").unlink()
    rows.rename(rows.with_name(f"{rows.name}.part")).write_bytes(b"half")
    assert open_cached(source(tmp_path), tmp_path).digest == first.digest
    assert leftovers(tmp_path) == sorted([rows.name, rows.with_suffix(".json").name])
