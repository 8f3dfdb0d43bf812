"""Crop, flip and normalise a whole batch of images on its device."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

# Mean and standard deviation by number of channels, of values in [0, 1]; for three they are ImageNet's, which is what
# torchvision's weights were trained with.
NORMALISATION = {
    1: ((0.5,), (0.5,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

TOGETHER = 2**20
"""Values of crops that a CPU makes at a time: they stay in its cache from one operation to the next."""


def augment(
    images: UInt8[Tensor, "b c h w"], crop_size: int, flip: bool, random: torch.Generator
) -> Float[Tensor, "b c {crop_size} {crop_size}"]:
    """Return random crops, half of them mirrored if `flip`, normalised.

    `random` is a CPU generator on every device, so that a run's crops do not depend on its hardware.
    """
    b, _, h, w = images.shape
    tops = torch.randint(h - crop_size + 1, (b,), generator=random)
    lefts = torch.randint(w - crop_size + 1, (b,), generator=random)
    mirrored = torch.rand(b, generator=random) < 0.5 * flip
    draws = (tops, lefts, mirrored)
    if images.device.type == "cpu":
        return _sliced(images, draws, crop_size)
    return normalise(_gathered(images, draws, crop_size))


def centre(images: UInt8[Tensor, "b c h w"], crop_size: int) -> Float[Tensor, "b c {crop_size} {crop_size}"]:
    """Return the centre crops, normalised."""
    top, left = ((side - crop_size) // 2 for side in images.shape[-2:])
    return normalise(images[..., top : top + crop_size, left : left + crop_size])


def normalise(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return (images / 255 - mean) / std, per channel."""
    mean, std = (_on_device(torch.tensor(values), images)[:, None, None] for values in NORMALISATION[images.shape[1]])
    return (images / 255).sub_(mean).div_(std)


Draws = tuple[Int[Tensor, " b"], Int[Tensor, " b"], Bool[Tensor, " b"]]
"""The top and the left of each image's crop, and whether it is mirrored; on the CPU."""


def _sliced(images: UInt8[Tensor, "b c h w"], draws: Draws, size: int) -> Float[Tensor, "b c {size} {size}"]:
    """Cut and normalise some crops at a time, so many on each of torch's threads: on a CPU the fastest."""
    b, c, _, _ = images.shape
    mean, std = (np.array(values, np.float32)[:, None, None] for values in NORMALISATION[c])
    crops = torch.empty(b, c, size, size)

    def make(crops: np.ndarray, images: np.ndarray, *draws: np.ndarray) -> None:
        parts = np.empty(crops.shape, np.uint8)
        for part, image, top, left, mirrored in zip(parts, images, *draws, strict=True):
            cut = image[:, top : top + size, left : left + size]
            part[:] = cut[..., ::-1] if mirrored else cut
        crops[:] = parts
        crops /= 255
        crops -= mean
        crops /= std

    some = max(1, TOGETHER // crops.shape[1:].numel())
    batches = ([few.numpy() for few in torch.split(whole, some)] for whole in (crops, images, *draws))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(make, *batches))
    return crops


def _gathered(images: UInt8[Tensor, "b c h w"], draws: Draws, size: int) -> UInt8[Tensor, "b c {size} {size}"]:
    """Take all crops in one command, where each command costs."""
    b, c, _, _ = images.shape
    tops, lefts, mirrored = (_on_device(drawn, images) for drawn in draws)
    along = torch.arange(size, device=images.device)
    down = tops[:, None] + along
    across = lefts[:, None] + torch.where(mirrored[:, None], size - 1 - along, along)
    sample = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[:, None, None]
    return images[sample, channel, down[:, None, :, None], across[:, None, None, :]]


def _on_device(few: Tensor, images: Tensor) -> Tensor:
    """Send some numbers after the images; so few go with the command, and the host does not wait."""
    return few.to(images.device, non_blocking=True)
