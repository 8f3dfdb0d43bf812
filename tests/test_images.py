"""Crops and mirrors equal plain loops, normalising equals torchvision's, whatever the memory looks like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from hdml_core.images import NORMALISATION, _gathered, _sliced, augment, centre, normalise


def draw_images(b=6, c=3, h=13, w=17, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (b, c, h, w), dtype=torch.uint8, generator=random)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def crops_in_loops(images, size, flip, random):
    """One pixel at a time, from the same three draws: tops, lefts, mirrors."""
    b, c, h, w = images.shape
    tops = torch.randint(h - size + 1, (b,), generator=random).tolist()
    lefts = torch.randint(w - size + 1, (b,), generator=random).tolist()
    mirrored = [flip and draw < 0.5 for draw in torch.rand(b, generator=random).tolist()]
    crops = torch.empty(b, c, size, size, dtype=torch.uint8)
    for i in range(b):
        for row in range(size):
            for column in range(size):
                source = size - 1 - column if mirrored[i] else column
                crops[i, :, row, column] = images[i, :, tops[i] + row, lefts[i] + source]
    return crops


@given(
    channels=st.sampled_from((1, 3)),
    side=st.tuples(st.integers(8, 14), st.integers(8, 14)),
    flip=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_augment_equals_the_plain_loops(channels, side, flip, seed):
    images = draw_images(3, channels, *side)
    crops = augment(images, 8, flip, generator(seed))
    assert torch.equal(crops, normalise(crops_in_loops(images, 8, flip, generator(seed))))


@given(seed=st.integers(0, 2**32), size=st.integers(8, 13))
def test_both_ways_to_crop_are_the_same(seed, size):
    images, random = draw_images(), generator(seed)
    draws = (
        torch.randint(14 - size, (6,), generator=random),
        torch.randint(18 - size, (6,), generator=random),
        torch.rand(6, generator=random) < 0.5,
    )
    assert torch.equal(_sliced(images, draws, size), normalise(_gathered(images, draws, size)))


def test_half_are_mirrored_and_the_others_are_not():
    images = draw_images(b=1, h=8, w=8).expand(400, -1, -1, -1)
    crops = augment(images, 8, True, generator())
    upright = normalise(images[:1])[0]
    is_upright = (crops == upright).flatten(1).all(1)
    is_mirrored = (crops == upright.flip(-1)).flatten(1).all(1)
    assert (is_upright ^ is_mirrored).all()
    assert 150 < is_mirrored.sum() < 250


def test_without_flip_a_crop_of_the_whole_is_the_whole():
    images = draw_images(h=12, w=12)
    assert torch.equal(augment(images, 12, False, generator()), normalise(images))


def test_flip_does_not_change_where_the_crops_are():
    images = draw_images()
    with_flip, without = (augment(images, 8, flip, generator()) for flip in (True, False))
    same = (with_flip == without).flatten(1).all(1)
    mirrored = (with_flip == without.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()


def test_every_offset_is_drawn():
    """A picture of its own coordinates, so that a crop's first pixel says where it was."""
    places = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    images = torch.nn.functional.pad(places, (0, 7, 0, 7)).expand(500, -1, -1, -1)
    first = augment(images, 8, False, generator())[:, 0, 0, 0]
    assert torch.equal(first.unique(), normalise(places).flatten())


def test_centre_is_torchvisions():
    images = draw_images(h=12, w=18)
    assert torch.equal(centre(images, 8), normalise(v2.functional.center_crop(images, [8, 8])))


def test_centre_leaves_the_odd_pixel_below_and_to_the_right():
    images = draw_images(h=13, w=9)
    assert torch.equal(centre(images, 8), normalise(images[:, :, 2:10, 0:8]))


@pytest.mark.parametrize("channels", NORMALISATION)
def test_normalise_equals_torchvision(channels):
    images = draw_images(c=channels)
    mean, std = NORMALISATION[channels]
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    torch.testing.assert_close(normalise(images), theirs(images))
    assert normalise(images).dtype == torch.float32


@pytest.mark.parametrize("together", [1, 4, 5, 6])
def test_crops_are_the_same_bitwise_however_many_are_made_together(together, monkeypatch):
    images = draw_images(b=5)
    monkeypatch.setattr("hdml_core.images.TOGETHER", together * 3 * 8 * 8)
    crops = augment(images, 8, True, generator())
    assert torch.equal(crops, normalise(crops_in_loops(images, 8, True, generator())))


def test_augment_draws_nothing_but_from_its_generator():
    before = torch.get_rng_state()
    images = draw_images()
    first, again = (augment(images, 8, True, generator()) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(augment(images, 8, True, generator(6)), first)


def test_images_are_not_written_to():
    images = draw_images()
    before = images.clone()
    augment(images, 8, True, generator())
    centre(images, 8)
    assert torch.equal(images, before)


@pytest.mark.parametrize("memory", ["channels_last", "strided", "memory_map", "transposed_memory_map"])
def test_the_layout_in_memory_is_indifferent(memory, tmp_path):
    images = draw_images()
    rows = np.array([4, 1, 1])
    wanted = images[torch.from_numpy(rows)]
    if memory == "channels_last":
        given_images = wanted.to(memory_format=torch.channels_last)
    elif memory == "strided":
        given_images = wanted.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        order = (0, 1, 2, 3) if memory == "memory_map" else (0, 2, 3, 1)
        np.save(tmp_path / "images.npy", images.permute(order).numpy())
        mapped = np.load(tmp_path / "images.npy", mmap_mode="r").transpose(np.argsort(order))
        given_images = torch.from_numpy(mapped[rows])
    assert torch.equal(augment(given_images, 8, True, generator()), augment(wanted, 8, True, generator()))
    assert torch.equal(centre(given_images, 8), centre(wanted, 8))
