"""What a frozen extractor gives: extracted once, memory-mapped, shared by all trials.

Where all of it is frozen these are features; where it is frozen up to a layer, that layer's activations, from which the
rest of it is trained. The cache is keyed by the data's digest, the extractor, its weights' content, how much of it is
frozen, and how the images are cropped, so any run that would compute the same opens the same file.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from hdml_core import images
from hdml_core.config import Config, ConfigError
from hdml_core.datasets import Dataset, load
from hdml_core.datasets.locks import locked
from hdml_core.networks import Extractor, build_extractor, cut_extractor, demand_channels

EXTRACTED_ROWS = 64
"""Images passed through the extractor at once."""


def open_data(config: Config, root: Path, device: torch.device | str = "cpu") -> Dataset:
    """Open the data set of `config`: its images, or what the frozen extractor or its frozen layers give of them.

    Features are Float32[m v f], activations Float32[m v c h w]; view 0 is the centre crop and the others are random
    crops, mirrored at random where `data.flip` says so. Raises DataError for the data, and ConfigError for the weights
    and where the extractor can't be cut at the layer `network.frozen`.
    """
    dataset = load(config.data, root)
    network = config.network
    if not network.frozen or dataset.kind == "features":
        return dataset
    if not network.weights:
        raise ConfigError(f"network.weights must be given where network.frozen is {network.frozen!r}, got ''")
    demand_channels(network, dataset.train.values.shape[1])
    path = root / "cache" / f"{dataset.name}-{network.extractor}-{_key(config, dataset)}.npy"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                _extract(config, dataset, torch.device(device), path)
    values = np.load(path, mmap_mode="r")
    return replace(dataset, train=replace(dataset.train, values=values), test=replace(dataset.test, values=values))


def _key(config: Config, dataset: Dataset) -> str:
    weights = Path(config.network.weights).expanduser()
    content = weights.read_bytes() if weights.is_file() else config.network.weights.encode()
    data = config.data
    parts = [
        dataset.digest,
        config.network.extractor,
        hashlib.sha256(content).hexdigest(),
        config.network.frozen,
        data.image_size,
        data.crop_size,
        data.feature_crops,
        data.flip and data.feature_crops > 1,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _extract(config: Config, dataset: Dataset, device: torch.device, path: Path) -> None:
    """Write what the frozen part gives of every row of the data set to `path`, whole or not at all."""
    network = config.network
    stem = (build_extractor(network) if network.frozen == "all" else cut_extractor(network).stem).to(device).eval()
    values = np.asarray(dataset.train.values)
    aside = path.with_name(f"{path.name}.part")
    try:
        with aside.open("wb") as file:
            for number, views in enumerate(_views(stem, values, config, device)):
                if number == 0:
                    shape = (len(values), *views.shape[1:])
                    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                file.write(views.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _views(
    stem: Extractor, values: np.ndarray, config: Config, device: torch.device
) -> Iterator[Float[Tensor, "b v ..."]]:
    """Yield what the stem gives, batch after batch, each once a GPU has been given the next one to do."""
    data, network, random = config.data, config.network, torch.Generator().manual_seed(0)
    starts = range(0, len(values), EXTRACTED_ROWS)
    under_way = deque[Callable[[], Tensor]]()
    for start in tqdm(starts, desc=f"{network.extractor}, frozen: {network.frozen}", unit="batch", disable=None):
        batch = _sent(values[start : start + EXTRACTED_ROWS], device)
        crops = [images.centre(batch, data.crop_size)]
        crops += [images.augment(batch, data.crop_size, data.flip, random) for _ in range(data.feature_crops - 1)]
        with torch.no_grad():
            rows = stem(torch.cat(crops) if len(crops) > 1 else crops[0])
        under_way.append(_fetched(rows.unflatten(0, (len(crops), len(batch))).transpose(0, 1)))
        if len(under_way) == 2:
            yield under_way.popleft()()
    yield under_way.popleft()()


def _sent(values: UInt8[np.ndarray, "b c h w"], device: torch.device) -> UInt8[Tensor, "b c h w"]:
    """Copy images to the device; the host does not wait for a GPU, which takes them from page-locked memory."""
    copied = torch.empty(values.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copied.numpy()[:] = values
    return copied.to(device, non_blocking=True)


def _fetched(rows: Tensor) -> Callable[[], Tensor]:
    """Begin to copy rows to the host; to call what is returned is to wait for them."""
    copied = rows.to("cpu", non_blocking=True)
    if rows.device.type == "cpu":
        return lambda: copied
    there = torch.Event(rows.device)
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return copied

    return wait
