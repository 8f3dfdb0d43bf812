"""The user's own images and features."""

import numpy as np
import pytest

from hdml_core.config import DataConfig
from hdml_core.datasets import DataError, load
from tests.datasets.made import image_file, write_folder

LABELS = np.repeat([10, 2, 7, 1], 3)


def images(path, size=8):
    return DataConfig(name="folder", path=str(path), image_size=size, crop_size=8)


def features(path):
    return DataConfig(name="features", path=str(path))


def test_class_folders(tmp_path):
    files = {f"{c}/{i}.png": image_file(i, "PNG") for c in "dbca" for i in (0, 1)} | {
        "notes.txt": b"",
        "c/._0.txt": b"",
    }
    own = write_folder(tmp_path / "own", files)
    dataset = load(images(own), tmp_path / "data")
    assert dataset.train.classes == ("a", "b")
    assert dataset.test.classes == ("c", "d")
    assert len(dataset.train) == len(dataset.test) == 4


def test_an_added_image_is_seen(tmp_path):
    own = write_folder(tmp_path / "own", {f"{c}/{i}.jpg": image_file(i) for c in "abcd" for i in (0, 1)})
    before = load(images(own), tmp_path)
    write_folder(own, {"a/2.jpg": image_file(2)})
    after = load(images(own), tmp_path)
    assert len(after.train) == len(before.train) + 1
    assert after.digest != before.digest


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"a/notes.txt": b""}, "must hold images .* in class folders, got none in"),
        ({"stray.png": b"", "a/0.png": b""}, "must lie in the folder of its class, got stray.png"),
        ({f"{c}/{i}.jpg": b"" for c in "abcd" for i in (0, 1)}, "a/0.jpg in .* is empty"),
    ],
)
def test_folders_that_will_not_do(tmp_path, files, complaint):
    own = write_folder(tmp_path / "own", files)
    with pytest.raises(DataError, match=complaint):
        load(images(own), tmp_path)


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_no_such_place(tmp_path, path):
    with pytest.raises(DataError, match=f"data.path must be a folder .*, got '{path}'"):
        load(images(path), tmp_path)
    with pytest.raises(DataError, match=f"data.path must be an .npz file .*, got '{path}'"):
        load(features(path), tmp_path)


@pytest.mark.parametrize("views", [None, 2])
def test_features(tmp_path, views):
    shape = (12, 5) if views is None else (12, views, 5)
    values = np.random.default_rng(0).normal(size=shape)
    np.savez(tmp_path / "own.npz", features=values, labels=LABELS)
    dataset = load(features(tmp_path / "own.npz"), tmp_path)
    assert dataset.kind == "features"
    assert dataset.train.classes == ("01", "02")
    assert dataset.test.classes == ("07", "10")
    assert dataset.train.feature_size == 5
    assert isinstance(dataset.train.values, np.memmap)
    assert np.array_equal(dataset.train.values, values.reshape(12, -1, 5).astype(np.float32))
    assert dataset.train.rows.tolist() == [3, 4, 5, 9, 10, 11]


def test_labels_may_be_words(tmp_path):
    np.savez(tmp_path / "own.npz", features=np.eye(8), labels=np.array(list("aabbccdd")))
    assert load(features(tmp_path / "own.npz"), tmp_path).train.classes == ("a", "b")


GOOD = np.ones((12, 5))
BAD_ARRAYS = {
    "no labels": ({"features": GOOD}, "with the arrays features and labels, got .*labels"),
    "no features": ({"labels": LABELS}, "with the arrays features and labels, got .*features"),
    "objects": ({"features": np.array([object()]), "labels": LABELS}, "with the arrays features and labels, got"),
    "one axis": ({"features": LABELS, "labels": LABELS}, r"of shape \(m, f\) or \(m, v, f\), got int64 \(12,\)"),
    "no rows": ({"features": GOOD[:0], "labels": LABELS[:0]}, r"got float64 \(0, 5\)"),
    "complex": ({"features": GOOD * 1j, "labels": LABELS}, "must be numbers of shape .* got complex128"),
    "too few labels": (
        {"features": GOOD, "labels": LABELS[:11]},
        r"must be 12 whole numbers or strings, got int64 \(11",
    ),
    "broken labels": ({"features": GOOD, "labels": LABELS / 2}, "whole numbers or strings, got float64"),
    "not a number": ({"features": np.where(GOOD.cumsum(0) == 4, np.nan, GOOD), "labels": LABELS}, "1 rows .* first 3"),
    "too large": ({"features": GOOD * 1e300, "labels": LABELS}, "must be finite, got 12 rows that are not, first 0"),
}


@pytest.mark.parametrize(("arrays", "complaint"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_will_not_do(tmp_path, arrays, complaint):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(DataError, match=complaint):
        load(features(tmp_path / "own.npz"), tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 400])
def test_a_truncated_file_of_features(tmp_path, kept):
    path = tmp_path / "own.npz"
    np.savez(path, features=GOOD, labels=LABELS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="own.npz must be an .npz file with the arrays features and labels"):
        load(features(path), tmp_path)


def test_one_array_is_no_npz(tmp_path):
    np.save(tmp_path / "own.npy", GOOD)
    with pytest.raises(DataError, match="own.npy must be an .npz file"):
        load(features(tmp_path / "own.npy"), tmp_path)
