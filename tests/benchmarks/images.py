"""Images: a training batch beside ImageFolder and a DataLoader, and extraction beside the bare forward pass."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from hdml_core import frozen, images
from hdml_core.config import recipe_config
from hdml_core.datasets import load
from hdml_core.networks import EXTRACTORS, build_extractor
from tests.benchmarks import Row, _birds, compare

BATCH = 128
PHOTOGRAPH = (375, 500)
"""What most photographs of CUB-200-2011 measure: height and width in pixels."""


def run(quick: bool) -> list[Row]:
    """Time both over the same files, at the authors' sizes and on real ones that are smaller; then an extraction."""
    with tempfile.TemporaryDirectory(prefix="images-") as folder:
        root = Path(folder)
        made_up, height_and_width = root / "made-up", (48, 64) if quick else PHOTOGRAPH
        _photographs(made_up, 4 if quick else 64, 8, height_and_width)
        rows = [_training(made_up, 36, 32, quick) if quick else _training(made_up, 256, 227, quick)]
        if _birds.ARCHIVE.is_file():
            _birds.unpack(root / "birds", 4 if quick else 64, of_each=16)
            rows.append(_training(root / "birds", 110, 96, quick))
        return [*rows, _extraction(root, quick)]


def _training(folder: Path, side: int, crop: int, quick: bool) -> Row:
    """Time a training image from files to a normalised batch; ours come from the memory map that all trials share."""
    config = recipe_config(
        {"data.name": "folder", "data.path": str(folder), "data.image_size": side, "data.crop_size": crop}
    )
    train = load(config.data, folder.parent).train
    mean, std = images.NORMALISATION[3]
    files = ImageFolder(
        str(folder),
        v2.Compose(
            [
                v2.Resize((side, side)),
                v2.RandomCrop(crop),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        ),
    )
    random = torch.Generator().manual_seed(0)
    epochs = 1 if quick else 8

    def ours() -> None:
        for _ in range(epochs):
            for positions in np.array_split(np.random.default_rng(0).permutation(len(train)), -(-len(train) // BATCH)):
                images.augment(train.take(positions, "cpu"), crop, True, random)

    def theirs(workers: int) -> Callable[[], object]:
        loader = DataLoader(files, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        return lambda: [None for _ in loader]

    rows = [
        compare(
            f"a training image, {side} to {crop} px, {folder.name}",
            ours,
            f"ImageFolder and DataLoader, {workers} workers",
            theirs(workers),
            1 if quick else 3,
            target=0.1,
        )
        for workers in ((0,) if quick else (0, os.cpu_count() or 1))
    ]
    # Of the peer's ways to load the faster counts. Half the classes train here, all of them are in the folder.
    row = min(rows, key=lambda row: row.peer)
    return row._replace(ours=1e3 * row.ours / len(train) / epochs, peer=1e3 * row.peer / len(files), unit="ms")


def _extraction(root: Path, quick: bool) -> Row:
    """Of a cache of features of one MobileNetV2, its weights random, in both; that it has to be built is left out."""
    rows, side, crop = (32, 40, 32) if quick else (1024, 110, 96)
    torch.manual_seed(0)
    save_file(EXTRACTORS["mobilenet_v2"].build().state_dict(), root / "weights.safetensors")
    _photographs(root / "more", rows // 8, 8, (side, side))
    config = recipe_config(
        {
            "data.name": "folder",
            "data.path": str(root / "more"),
            "data.image_size": side,
            "data.crop_size": crop,
            "network.extractor": "mobilenet_v2",
            "network.weights": str(root / "weights.safetensors"),
            "network.frozen": "all",
        }
    )
    dataset = load(config.data, root)
    bare = build_extractor(config.network).eval()
    values = torch.from_numpy(np.array(dataset.train.values))
    batches = [images.centre(part, crop) for part in values.split(frozen.EXTRACTED_ROWS)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                bare(batch)

    def extract() -> None:
        with mock.patch.object(frozen, "build_extractor", return_value=bare):
            frozen._extract(config, dataset, torch.device("cpu"), root / "features.npy")

    what = f"extraction, MobileNetV2 at {crop} px"
    return compare(what, extract, "its bare forward pass", forward, 1 if quick else 3, target=1 / 0.95)


def _photographs(folder: Path, classes: int, of_each: int, height_and_width: tuple[int, int]) -> None:
    """Make smooth pictures with some noise, whose files are as large as those of photographs."""
    random = np.random.default_rng(0)
    height, width = height_and_width
    for number in range(classes):
        of_class = folder / f"{number:03d}"
        of_class.mkdir(parents=True)
        for picture in range(of_each):
            coarse = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            noisy = np.clip(smooth + random.normal(scale=4, size=smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(of_class / f"{picture}.jpg", quality=90)
