"""Omniglot's archives, its two ways to split, its twenty drawings of each character."""

import os
from dataclasses import replace

import pytest

from hdml_core.config import DataConfig
from hdml_core.datasets import DataError, load
from hdml_core.datasets.archives import Archive
from hdml_core.datasets.omniglot import read
from tests.datasets.made import image_file, write_folder, write_zip

CONFIG = DataConfig(name="omniglot", image_size=8, crop_size=8)
ALPHABETS = {"Latin": 4, "Greek": 2, "Greek_(old)": 2}


def drawings(top, alphabets=ALPHABETS, count=20):
    return {
        f"{top}/{alphabet}/character{character:02d}/{character:04d}_{drawing:02d}.png": image_file(drawing, "PNG", "1")
        for alphabet, characters in alphabets.items()
        for character in range(1, characters + 1)
        for drawing in range(1, count + 1)
    }


def test_disjoint_by_character(tmp_path):
    write_zip(tmp_path / "images_background.zip", drawings("images_background"))
    dataset = load(CONFIG, tmp_path)
    assert dataset.train.values.shape == (160, 1, 8, 8)
    assert len(dataset.train) == len(dataset.test) == 80
    assert dataset.test.classes[0] == "Latin/character01"


def test_disjoint_by_alphabet(tmp_path):
    write_folder(tmp_path, drawings("images_background"))
    dataset = load(replace(CONFIG, disjoint_by="alphabet"), tmp_path)
    assert {name.partition("/")[0] for name in dataset.train.classes} == {"Greek", "Greek_(old)"}
    assert {name.partition("/")[0] for name in dataset.test.classes} == {"Latin"}


def test_what_two_archives_share_counts_once(tmp_path):
    write_zip(tmp_path / "images_background.zip", drawings("images_background"))
    write_zip(tmp_path / "images_background_small1.zip", drawings("images_background_small1", {"Latin": 4}))
    write_zip(tmp_path / "images_evaluation.zip", drawings("images_evaluation", {"Tengwar": 2}))
    dataset = load(CONFIG, tmp_path)
    assert len(dataset.train) + len(dataset.test) == 200


def test_a_character_of_nineteen_drawings(tmp_path):
    files = drawings("images_background")
    del files["images_background/Greek/character02/0002_07.png"]
    write_zip(tmp_path / "images_background.zip", files)
    with pytest.raises(DataError, match="must have 20 drawings, got 19 of Greek/character02 in"):
        load(CONFIG, tmp_path)


def test_where_there_is_none_the_whole_is_downloaded(tmp_path):
    unreachable = Archive("images_background.zip", address=(tmp_path / "nowhere").as_uri())
    with pytest.raises(DataError, match="images_background.zip not found in .*by hand and put it at"):
        read(CONFIG, tmp_path, whole=[unreachable])


@pytest.mark.data
def test_the_real_drawings(tmp_path, shared):
    archive = shared / "data" / "images_background_small1.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} not found")
    os.symlink(archive, tmp_path / archive.name)
    config = DataConfig(name="omniglot", image_size=32)
    by_character, by_alphabet = (load(replace(config, disjoint_by=d), tmp_path) for d in ("character", "alphabet"))
    assert (by_character.train.num_classes, by_character.test.num_classes) == (68, 68)
    assert len(by_character.train) == 68 * 20
    alphabets = [{name.partition("/")[0] for name in side.classes} for side in (by_alphabet.train, by_alphabet.test)]
    assert alphabets == [{"Balinese", "Early_Aramaic", "Greek"}, {"Korean", "Latin"}]
    ink = by_character.train.values[:100].mean() / 255
    assert 0 < ink < 0.3
