"""Features of an extractor that is never trained: extracted once, memory-mapped, shared by all trials.

The cache is keyed by the data's digest, the extractor, its weights' content, and how the images are cropped, so any
run that would compute the same features opens the same file.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from hdml_core import images
from hdml_core.config import Config, ConfigError
from hdml_core.datasets import Dataset, load
from hdml_core.datasets.locks import locked
from hdml_core.networks import Extractor, build_extractor, demand_channels

EXTRACTED_ROWS = 64
"""Images passed through the extractor at once."""


def open_data(config: Config, root: Path, device: torch.device | str = "cpu") -> Dataset:
    """Open the data set of `config`: its images, or their features where the extractor is frozen.

    Features are Float32[m v f]; view 0 is the centre crop and the others are random crops, mirrored at random where
    `data.flip` says so. Raises DataError for the data and ConfigError for the weights.
    """
    dataset = load(config.data, root)
    if not config.network.frozen or dataset.kind == "features":
        return dataset
    if not config.network.weights:
        raise ConfigError("network.weights must be given where network.frozen is True, got ''")
    demand_channels(config.network, dataset.train.values.shape[1])
    path = root / "cache" / f"{dataset.name}-{config.network.extractor}-{_key(config, dataset)}.npy"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                _extract(config, dataset, torch.device(device), path)
    features = np.load(path, mmap_mode="r")
    return replace(
        dataset,
        kind="features",
        train=replace(dataset.train, values=features),
        test=replace(dataset.test, values=features),
    )


def _key(config: Config, dataset: Dataset) -> str:
    weights = Path(config.network.weights).expanduser()
    content = weights.read_bytes() if weights.is_file() else config.network.weights.encode()
    data = config.data
    parts = [
        dataset.digest,
        config.network.extractor,
        hashlib.sha256(content).hexdigest(),
        data.image_size,
        data.crop_size,
        data.feature_crops,
        data.flip and data.feature_crops > 1,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _extract(config: Config, dataset: Dataset, device: torch.device, path: Path) -> None:
    """Write the features of every row of the data set to `path`, whole or not at all."""
    extractor = build_extractor(config.network).to(device).eval()
    values = dataset.train.values
    aside = path.with_name(f"{path.name}.part")
    try:
        with aside.open("wb") as file:
            shape = (len(values), config.data.feature_crops, extractor.feature_size)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for features in _features(extractor, values, config, device):
                file.write(features.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _features(
    extractor: Extractor, values: np.ndarray, config: Config, device: torch.device
) -> Iterator[Float[Tensor, "b v f"]]:
    data, random = config.data, torch.Generator().manual_seed(0)
    starts = range(0, len(values), EXTRACTED_ROWS)
    for start in tqdm(starts, desc=f"features of {config.network.extractor}", unit="batch", disable=None):
        batch = torch.from_numpy(np.array(values[start : start + EXTRACTED_ROWS])).to(device)
        crops = [images.centre(batch, data.crop_size)]
        crops += [images.augment(batch, data.crop_size, data.flip, random) for _ in range(data.feature_crops - 1)]
        with torch.no_grad():
            views = extractor(torch.cat(crops)).cpu()
        yield views.view(len(crops), len(batch), -1).transpose(0, 1)
