"""Crops equal plain slicing, flips mirror, and normalisation is torchvision's."""

import pytest
import torch
from torchvision.transforms import v2

from hdml_core import images


def random_images(channels=3, b=8, h=20, w=24):
    return torch.randint(0, 256, (b, channels, h, w), dtype=torch.uint8)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_equals_plain_slicing(channels, flip):
    batch, random = random_images(channels), generator()
    tops, lefts = torch.randint(9, (8,), generator=random), torch.randint(13, (8,), generator=random)
    mirrored = torch.rand(8, generator=random) < 0.5 * flip
    wanted = []
    for image, top, left, mirror in zip(batch, tops, lefts, mirrored, strict=True):
        crop = image[:, top : top + 12, left : left + 12]
        wanted.append(crop.flip(-1) if mirror else crop)
    torch.testing.assert_close(
        images.augment(batch, 12, flip, generator()), images.normalise(torch.stack(wanted)), rtol=0, atol=0
    )
    assert bool(mirrored.any()) == flip


def test_the_centre_crop_is_the_middle():
    batch = random_images()
    wanted = images.normalise(batch[:, :, 4:16, 6:18])
    torch.testing.assert_close(images.centre(batch, 12), wanted, rtol=0, atol=0)


def test_normalisation_is_torchvisions():
    batch = random_images()
    mean, std = images.NORMALISATION[3]
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    torch.testing.assert_close(images.normalise(batch), theirs(batch), rtol=1e-5, atol=1e-6)


def test_a_crop_of_the_whole_image_is_the_image():
    batch = random_images(h=16, w=16)
    torch.testing.assert_close(images.augment(batch, 16, False, generator()), images.normalise(batch), rtol=0, atol=0)


def test_every_place_and_both_sides_occur():
    batch = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(500, 1, 4, 4)
    corners = images.augment(batch, 2, True, generator())[:, 0, 0, 0]
    assert len(corners.unique()) == 12
