"""CUB-200-2011, Cars196 and Stanford Online Products in their official layouts, made small."""

import os

import numpy as np
import pytest

from hdml_core.config import DataConfig
from hdml_core.datasets import DataError, cars196, cub200, load, sop
from hdml_core.datasets.archives import Archive
from hdml_core.datasets.base import Counts
from hdml_core.datasets.cache import open_cached
from tests.datasets.made import annotations, birds, image_file, products, write_folder, write_tar, write_zip

CONFIG = DataConfig(name="cub200", image_size=8, crop_size=8)
FOUR_BIRDS = Counts(images=8, classes=4, train_images=4, train_classes=2)


def open_birds(root, expected=FOUR_BIRDS):
    return open_cached(cub200.read(CONFIG, root, expected=expected), root)


def test_birds(tmp_path):
    write_tar(tmp_path / "CUB_200_2011.tgz", birds())
    dataset = open_birds(tmp_path)
    assert dataset.train.classes == ("001.Bird", "002.Bird")
    assert dataset.test.classes == ("003.Bird", "004.Bird")
    assert dataset.train.values.shape == (8, 3, 8, 8)


def test_the_unpacked_folder_is_the_same_data_set(tmp_path):
    (tmp_path / "tar").mkdir()
    write_tar(tmp_path / "tar" / "CUB_200_2011.tgz", birds())
    write_folder(tmp_path / "folder", birds())
    packed, unpacked = open_birds(tmp_path / "tar"), open_birds(tmp_path / "folder")
    assert packed.digest == unpacked.digest
    assert np.array_equal(packed.train.values, unpacked.train.values)


def test_a_missing_bird(tmp_path):
    write_tar(tmp_path / "CUB_200_2011.tgz", birds())
    with pytest.raises(DataError, match="cub200 must have 9 rows, got 8 in .*CUB_200_2011.tgz"):
        open_birds(tmp_path, FOUR_BIRDS._replace(images=9))


def test_a_bird_of_another_class(tmp_path):
    files = birds()
    files["CUB_200_2011/images/001.Bird/Bird_7.jpg"] = files.pop("CUB_200_2011/images/004.Bird/Bird_0.jpg")
    write_tar(tmp_path / "CUB_200_2011.tgz", files)
    with pytest.raises(DataError, match=r"cub200 must have Counts\(images=8, .*, got .*train_images=5"):
        open_birds(tmp_path)


def test_a_damaged_bird_is_named(tmp_path):
    files = birds() | {"CUB_200_2011/images/003.Bird/Bird_1.jpg": b""}
    write_tar(tmp_path / "CUB_200_2011.tgz", files)
    with pytest.raises(DataError, match="003.Bird/Bird_1.jpg in .*CUB_200_2011.tgz is empty"):
        open_birds(tmp_path)


def test_a_truncated_archive_of_birds(tmp_path):
    path = write_tar(tmp_path / "CUB_200_2011.tgz", birds())
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="CUB_200_2011.tgz is damaged or cut short"):
        open_birds(tmp_path)


@pytest.mark.data
def test_the_real_birds(tmp_path, shared):
    archive = shared / "data" / "CUB_200_2011.tgz"
    if not archive.is_file():
        pytest.skip(f"{archive} not found")
    os.symlink(archive, tmp_path / archive.name)
    dataset = load(DataConfig(name="cub200", image_size=32), tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (5_864, 5_924)
    assert (dataset.train.num_classes, dataset.test.num_classes) == (100, 100)
    assert dataset.train.classes[0] == "001.Black_footed_Albatross"
    assert dataset.test.classes[-1] == "200.Common_Yellowthroat"


CARS = Counts(images=8, classes=4, train_images=4, train_classes=2)
NUMBERS = [f"{number:06d}.jpg" for number in range(1, 9)]


def open_cars(root):
    return open_cached(cars196.read(CONFIG, root, CARS), root)


def test_cars_in_one_archive(tmp_path):
    write_tar(tmp_path / "car_ims.tgz", {f"car_ims/{name}": image_file(i) for i, name in enumerate(NUMBERS)})
    table = annotations("relative_im_path", [f"car_ims/{name}" for name in NUMBERS], [4, 1, 2, 3, 4, 1, 2, 3])
    (tmp_path / "cars_annos.mat").write_bytes(table)
    dataset = open_cars(tmp_path)
    assert dataset.train.classes == ("001", "002")
    assert dataset.train.rows.tolist() == [1, 2, 5, 6]
    assert dataset.train.labels.tolist() == [0, 1, 0, 1]


def test_cars_in_two_halves_with_numbers_of_their_own(tmp_path):
    for side in ("train", "test"):
        files = {f"cars_{side}/{name}": image_file(i) for i, name in enumerate(NUMBERS[:4])}
        write_tar(tmp_path / f"cars_{side}.tgz", files)
    (tmp_path / "devkit").mkdir()
    (tmp_path / "devkit" / "cars_train_annos.mat").write_bytes(annotations("fname", NUMBERS[:4], [4, 3, 2, 1]))
    (tmp_path / "cars_test_annos_withlabels.mat").write_bytes(annotations("fname", NUMBERS[:4], [1, 2, 3, 4]))
    dataset = open_cars(tmp_path)
    assert dataset.train.rows.tolist() == [2, 3, 4, 5]
    assert dataset.train.labels.tolist() == [1, 0, 0, 1]


def test_cars_cannot_be_downloaded(tmp_path):
    with pytest.raises(DataError, match="car_ims.tgz not found in .*its official address is gone.*put it at"):
        open_cars(tmp_path)


def test_cars_without_their_classes(tmp_path):
    write_tar(tmp_path / "car_ims.tgz", {})
    with pytest.raises(DataError, match="classes of cars196 not found in .*: put cars_annos.mat at"):
        open_cars(tmp_path)


@pytest.mark.parametrize(
    "table", [b"", b"no table", annotations("fname", ["a"], [1])], ids=["empty", "text", "columns"]
)
def test_a_damaged_table_of_cars(tmp_path, table):
    write_tar(tmp_path / "car_ims.tgz", {})
    (tmp_path / "cars_annos.mat").write_bytes(table)
    with pytest.raises(DataError, match="cars_annos.mat must be a .mat file with annotations"):
        open_cars(tmp_path)


PRODUCTS = Counts(images=8, classes=4, train_images=4, train_classes=2)


def open_products(root):
    return open_cached(sop.read(CONFIG, root, expected=PRODUCTS), root)


@pytest.mark.parametrize("packed", [True, False])
def test_products(tmp_path, packed):
    if packed:
        write_zip(tmp_path / "Stanford_Online_Products.zip", products())
    else:
        write_folder(tmp_path, products())
    dataset = open_products(tmp_path)
    assert dataset.train.classes == ("train/00001", "train/00002")
    assert dataset.test.classes == ("test/00003", "test/00004")
    assert len(dataset.train) == len(dataset.test) == 4


def test_products_without_their_lists(tmp_path):
    write_zip(tmp_path / "Stanford_Online_Products.zip", {"Stanford_Online_Products/Ebay_train.txt": b""})
    with pytest.raises(
        DataError, match=r"sop must have its lists Ebay_train.txt, Ebay_test.txt, got \['Ebay_train.txt'"
    ):
        open_products(tmp_path)


def test_a_damaged_list_of_products(tmp_path):
    files = products() | {"Stanford_Online_Products/Ebay_test.txt": b"header\n5 three 1 a/b.JPG\n"}
    write_zip(tmp_path / "Stanford_Online_Products.zip", files)
    with pytest.raises(DataError, match="a row of Ebay_test.txt must be three numbers and a path, got '5 three"):
        open_products(tmp_path)


@pytest.mark.parametrize("module", [cub200, sop])
def test_what_cannot_be_downloaded_is_named(tmp_path, module):
    unreachable = Archive(module.ARCHIVE.file, address=(tmp_path / "nowhere").as_uri(), md5=module.ARCHIVE.md5)
    with pytest.raises(DataError, match=f"{module.ARCHIVE.file} not found in .*by hand and put it at"):
        module.read(CONFIG, tmp_path, archive=unreachable)
