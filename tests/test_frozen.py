"""Cached features are what the extractor gives, are extracted once, and are never those of something else."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hdml_core import frozen, images, networks
from hdml_core.config import ConfigError, recipe_config
from hdml_core.networks import build_extractor

SIZE = 16


def small_extractor():
    return nn.Sequential(nn.Conv2d(3, SIZE, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(autouse=True)
def small_mobilenet(monkeypatch):
    """A shallow stand-in: deep random networks give every image nearly the same feature."""
    body = networks.EXTRACTORS["mobilenet_v2"]._replace(build=small_extractor, classifier="", feature_size=SIZE)
    monkeypatch.setitem(networks.EXTRACTORS, "mobilenet_v2", body)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of six classes of four small images, and weights for mobilenet_v2."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in "abcdef":
        (root / "birds" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "birds" / name / f"{number}.png")
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(small_extractor().state_dict(), root / f"weights{seed}.safetensors")
    return root


def config_of(root, **settings):
    defaults = {
        "data.name": "folder",
        "data.path": str(root / "birds"),
        "data.image_size": 40,
        "data.crop_size": 32,
        "network.extractor": "mobilenet_v2",
        "network.weights": str(root / "weights0.safetensors"),
        "network.frozen": True,
    }
    return recipe_config(defaults | settings)


def test_features_are_those_of_the_centre_crops(photographs):
    config = config_of(photographs)
    dataset = frozen.open_data(config, photographs)
    extractor = build_extractor(config.network).eval()
    pixels = frozen.load(config.data, photographs)
    assert dataset.kind == "features"
    assert dataset.digest == pixels.digest
    assert dataset.train.feature_size == SIZE
    for features, originals in ((dataset.train, pixels.train), (dataset.test, pixels.test)):
        batch = torch.from_numpy(originals.values[originals.rows])
        with torch.no_grad():
            wanted = extractor(images.centre(batch, 32))
        torch.testing.assert_close(torch.from_numpy(features.values[features.rows][:, 0]), wanted, rtol=1e-4, atol=1e-5)


def test_they_are_extracted_once(photographs, monkeypatch):
    config = config_of(photographs)
    first = frozen.open_data(config, photographs)

    def never(*_):
        raise AssertionError("extracted a second time")

    monkeypatch.setattr(frozen, "build_extractor", never)
    second = frozen.open_data(config, photographs)
    assert isinstance(second.train.values, np.memmap)
    np.testing.assert_array_equal(first.train.values, second.train.values)


@pytest.mark.parametrize(
    "change", [{"data.crop_size": 24}, {"network.weights": "weights1"}, {"data.feature_crops": 2}], ids=str
)
def test_another_crop_or_other_weights_are_other_features(photographs, change):
    if "network.weights" in change:
        change = {"network.weights": str(photographs / "weights1.safetensors")}
    base, other = (frozen.open_data(config_of(photographs, **c), photographs) for c in ({}, change))
    assert base.train.values.shape != other.train.values.shape or not np.array_equal(
        base.train.values, other.train.values
    )


def test_several_crops_differ_and_the_first_is_the_centre(photographs):
    one = frozen.open_data(config_of(photographs), photographs).train.values
    three = frozen.open_data(config_of(photographs, **{"data.feature_crops": 3}), photographs).train.values
    assert three.shape == (24, 3, SIZE)
    np.testing.assert_allclose(three[:, 0], one[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(three[:, 1] - three[:, 2]).max() > 0.01


def test_a_frozen_extractor_needs_weights(photographs):
    with pytest.raises(ConfigError, match="network.weights must be given where network.frozen is True, got ''"):
        frozen.open_data(config_of(photographs, **{"network.weights": ""}), photographs)


def test_an_extractor_for_other_images(photographs):
    with pytest.raises(ConfigError, match="network.extractor must be one of googlenet, resnet50, mobilenet_v2 for"):
        frozen.open_data(config_of(photographs, **{"network.extractor": "convnet"}), photographs)


def test_a_failure_half_way_leaves_no_file(photographs, monkeypatch):
    def fails(*_):
        yield torch.zeros(3, 1, SIZE)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen, "_features", fails)
    before = set((photographs / "cache").glob("*.npy*"))
    with pytest.raises(OSError, match="No space left"):
        frozen.open_data(config_of(photographs, **{"data.crop_size": 28}), photographs)
    assert set((photographs / "cache").glob("*.npy*")) == before
