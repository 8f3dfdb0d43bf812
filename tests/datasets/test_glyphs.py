"""The glyphs are the same on every machine, each class its own shape, neither trivial nor hopeless to retrieve."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hdml_core.config import DataConfig
from hdml_core.datasets import load
from hdml_core.datasets.glyphs import CHARACTERS, FONTS, INSTANCES, draw, fonts_with, load_font

# Of the pinned matplotlib, which has the fonts, and the pinned Pillow, which has FreeType.
DIGEST = "df5af4926869d5c8beab68294425b3b57ef66a1960108a740f4140abbf246a80"

UPRIGHT = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "DejaVuSans-Bold", "DejaVuSerif-Bold")
SIDE, MARGIN = 32, 2
APART = 0.06


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load(DataConfig(), tmp_path_factory.mktemp("data"))


def test_size_and_split(dataset):
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 300
    assert dataset.train.num_classes == dataset.test.num_classes == 150
    assert dataset.train.values.shape == (300 * INSTANCES, 1, 32, 32)
    assert np.bincount(dataset.test.labels).tolist() == [20] * 150
    assert dataset.train.values.reshape(6000, -1).max(axis=1).min() > 100


def test_the_same_bytes_everywhere(dataset):
    assert dataset.digest == DIGEST


def test_each_character_has_many_fonts_that_draw_it():
    assert min(len(fonts_with(character)) for character in CHARACTERS) >= 12
    assert set(fonts_with("Л")) <= set(FONTS)
    assert "cmr10" in fonts_with("A")


def test_instances_differ():
    images = {draw("A", font, i).tobytes() for i, font in enumerate(fonts_with("A")[:INSTANCES])}
    assert len(images) == INSTANCES


def test_neither_trivial_nor_hopeless(dataset):
    """Nearest pixels find the class of less than half of the drawings, and of many more than chance would (0.6 %)."""
    rows = dataset.test.values[dataset.test.rows].reshape(len(dataset.test), -1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -1)
    recall = np.mean(dataset.test.labels[similarity.argmax(axis=1)] == dataset.test.labels)
    assert 0.2 < recall < 0.5


def outline(character, font, stretched):
    """Where a glyph has ink, and where it has ink nearby, at one height or, stretched, at one height and width."""
    mask = load_font(font).getmask(character)
    glyph = Image.frombytes("L", mask.size, bytes(mask))
    glyph = glyph.crop(glyph.getbbox())
    if stretched and min(glyph.size) > 0.35 * max(glyph.size):
        width, height = SIDE, SIDE
    else:
        width, height = (max(1, round(side * SIDE / max(glyph.size))) for side in glyph.size)
    square = Image.new("L", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN))
    corner = ((square.width - width) // 2, (square.height - height) // 2)
    square.paste(glyph.resize((width, height), Image.Resampling.BOX), corner)
    ink = square.point(lambda value: 255 * (value > 127))
    return [np.asarray(image).ravel() > 0 for image in (ink, ink.filter(ImageFilter.MaxFilter(3)))]


def apart(characters, stretched):
    """Share of two glyphs' ink that has none of the other's nearby: for each pair of characters, the least of all pairs
    of fonts.
    """
    drawn = [(i, c, font) for i, c in enumerate(characters) for font in UPRIGHT if font in fonts_with(c)]
    ink, near = (np.stack(part) for part in zip(*(outline(c, font, stretched) for _, c, font in drawn), strict=True))
    alone = ink.astype(np.float32) @ (~near).astype(np.float32).T
    share = (alone + alone.T) / (ink.sum(axis=1)[:, None] + ink.sum(axis=1)[None])
    starts = np.searchsorted([i for i, _, _ in drawn], np.arange(len(characters)))
    least = np.minimum.reduceat(np.minimum.reduceat(share, starts, axis=0), starts, axis=1)
    np.fill_diagonal(least, 1)
    return least


@pytest.mark.parametrize("stretched", [False, True])
def test_no_two_classes_look_alike(stretched):
    least = apart(sorted(CHARACTERS), stretched)
    assert least.min() >= APART


@pytest.mark.parametrize("twins", ["AА", "AΑ", "sS", "×X", "l|"])
def test_twins_would_be_found(twins):
    assert min(apart(list(twins), stretched).min() for stretched in (False, True)) < APART
