"""Images: a training batch beside ImageFolder and a DataLoader, and extraction beside the bare forward pass."""

import tempfile
import time
from pathlib import Path

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
from tests.benchmarks import Row, compare

SIDE, CROP, BATCH = 256, 227, 128
"""The authors' sizes."""


def run(quick: bool) -> list[Row]:
    """Time an epoch of both over the same JPEG files, and the extraction of a cache."""
    with tempfile.TemporaryDirectory(prefix="images-") as folder:
        return [_training(Path(folder), quick), _extraction(Path(folder), quick)]


def _training(root: Path, quick: bool) -> Row:
    classes, side, crop, repeats = (4, 36, 32, 1) if quick else (64, SIDE, CROP, 3)
    _photographs(root / "photographs", classes, 8, side * 3 // 2)
    config = recipe_config(
        {"data.name": "folder", "data.path": str(root / "photographs"), "data.image_size": side, "data.crop_size": crop}
    )
    train = load(config.data, root).train
    mean, std = images.NORMALISATION[3]
    folder = ImageFolder(
        str(root / "photographs"),
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

    def ours() -> None:
        for positions in np.array_split(np.random.default_rng(0).permutation(len(train)), -(-len(train) // BATCH)):
            images.augment(train.take(positions, "cpu"), crop, True, random)

    def theirs(workers: int) -> float:
        begin = time.perf_counter()
        for _ in DataLoader(folder, BATCH, shuffle=True, num_workers=workers, persistent_workers=False):
            pass
        return time.perf_counter() - begin

    # Half the classes train here, all are in the folder; and of the peer's ways to load the faster counts.
    share = len(folder) / len(train)
    workers = min((0,) if quick else (0, 2), key=theirs)
    row = compare(
        f"a training image, {side} to {crop} px",
        ours,
        f"ImageFolder and DataLoader, {workers} workers",
        lambda: theirs(workers),
        repeats,
        target=0.1,
    )
    return row._replace(ours=1e3 * row.ours / len(train), peer=1e3 * row.peer / len(train) / share, unit="ms")


def _extraction(root: Path, quick: bool) -> Row:
    """Of a cache of MobileNetV2's features, its weights random."""
    rows, side, crop, repeats = (8, 40, 32, 1) if quick else (512, 110, 96, 3)
    torch.manual_seed(0)
    save_file(EXTRACTORS["mobilenet_v2"].build().state_dict(), root / "weights.safetensors")
    _photographs(root / "more", rows // 2, 2, side)
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
        frozen._extract(config, dataset, torch.device("cpu"), root / "features.npy")

    return compare(
        f"extraction, MobileNetV2 at {crop} px", extract, "its bare forward pass", forward, repeats, target=1 / 0.95
    )


def _photographs(folder: Path, classes: int, of_each: int, side: int) -> None:
    """Smooth pictures, which compress as photographs do."""
    random = np.random.default_rng(0)
    for number in range(classes):
        of_class = folder / f"{number:03d}"
        of_class.mkdir(parents=True)
        for picture in range(of_each):
            coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(of_class / f"{picture}.jpg", quality=90)
