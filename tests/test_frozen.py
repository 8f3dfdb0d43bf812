"""The cache holds what the frozen part gives, is made once, of nothing else, and what comes after it trains alike."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hdml_core import checkpoint, frozen, images, networks, training
from hdml_core.config import ConfigError, recipe_config
from hdml_core.networks import build_extractor, cut_extractor
from tests.test_training import assert_equal_runs

SIZE = 16
LAYER = "2"


def small_extractor():
    return nn.Sequential(
        nn.Conv2d(3, SIZE, 3, stride=3),
        nn.BatchNorm2d(SIZE),
        nn.ReLU(),
        nn.Conv2d(SIZE, SIZE, 3),
        nn.BatchNorm2d(SIZE),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


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
        "network.frozen": "all",
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
    "change",
    [
        {"data.crop_size": 24},
        {"network.weights": "weights1"},
        {"data.feature_crops": 2},
        {"network.frozen": "0"},
        {"network.frozen": "1"},
        {"network.frozen": "all"},
    ],
    ids=str,
)
def test_another_crop_or_layer_or_other_weights_are_another_cache(photographs, change):
    if "network.weights" in change:
        change = {"network.weights": str(photographs / "weights1.safetensors")}
    base, other = (
        frozen.open_data(config_of(photographs, **{"network.frozen": LAYER} | c), photographs) for c in ({}, change)
    )
    assert base.train.values.filename != other.train.values.filename
    assert base.train.values.shape != other.train.values.shape or not np.array_equal(
        base.train.values, other.train.values
    )


@pytest.mark.parametrize(("part", "shape"), [("all", (SIZE,)), (LAYER, (SIZE, 10, 10))])
def test_several_crops_differ_and_the_first_is_the_centre(photographs, part, shape):
    one, three = (
        frozen.open_data(
            config_of(photographs, **{"network.frozen": part, "data.feature_crops": crops}), photographs
        ).train.values
        for crops in (1, 3)
    )
    assert three.shape == (24, 3, *shape)
    assert three.dtype == np.float32
    np.testing.assert_allclose(three[:, 0], one[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(three[:, 1] - three[:, 2]).max() > 0.01


def test_batches_follow_each_other_and_none_is_lost(photographs, monkeypatch, tmp_path):
    monkeypatch.setattr(frozen, "EXTRACTED_ROWS", 7)
    config = config_of(photographs, **{"data.crop_size": 30, "data.flip": True, "data.feature_crops": 3})
    dataset = frozen.load(config.data, photographs)
    frozen._extract(config, dataset, torch.device("cpu"), tmp_path / "features.npy")
    extractor, random, wanted = build_extractor(config.network).eval(), torch.Generator().manual_seed(0), []
    for batch in torch.from_numpy(np.array(dataset.train.values)).split(7):
        crops = [images.centre(batch, 30), *(images.augment(batch, 30, True, random) for _ in range(2))]
        with torch.no_grad():
            wanted += torch.stack(extractor(torch.cat(crops)).split(len(batch)), dim=1)
    assert len(wanted) == 24
    assert np.array_equal(np.load(tmp_path / "features.npy"), torch.stack(wanted).numpy())


@pytest.mark.parametrize("part", ["all", LAYER])
def test_a_frozen_extractor_needs_weights(photographs, part):
    config = config_of(photographs, **{"network.weights": "", "network.frozen": part})
    with pytest.raises(ConfigError, match=f"network.weights must be given where network.frozen is '{part}', got ''"):
        frozen.open_data(config, photographs)


def test_a_layer_that_it_cannot_be_cut_at(photographs):
    before = set((photographs / "cache").glob("*.npy*"))
    with pytest.raises(ConfigError, match="network.frozen must be '', 'all' or a layer of .*, such as 0, .*, got '6'"):
        frozen.open_data(config_of(photographs, **{"network.frozen": "6"}), photographs)
    assert set((photographs / "cache").glob("*.npy*")) == before


def test_an_extractor_for_other_images(photographs):
    with pytest.raises(ConfigError, match="network.extractor must be one of googlenet, resnet50, mobilenet_v2 for"):
        frozen.open_data(config_of(photographs, **{"network.extractor": "convnet"}), photographs)


def test_a_failure_half_way_leaves_no_file(photographs, monkeypatch):
    def fails(*_):
        yield torch.zeros(3, 1, SIZE)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen, "_views", fails)
    before = set((photographs / "cache").glob("*.npy*"))
    with pytest.raises(OSError, match="No space left"):
        frozen.open_data(config_of(photographs, **{"data.crop_size": 28}), photographs)
    assert set((photographs / "cache").glob("*.npy*")) == before


# Training what comes after the frozen layers


def training_config(root, **settings):
    """A small run, whose every crop is the whole image."""
    defaults = {
        "network.frozen": LAYER,
        "network.embedding_size": 8,
        "data.crop_size": 40,
        "data.flip": False,
        "data.batch_size": 6,
        "optim.epochs": 2,
        "optim.weight_decay": 1e-3,
        "optim.lr_extractor": 1e-2,
        "retrieval.clusterings": 1,
        "retrieval.ks": (1, 2),
    }
    return config_of(root, **defaults | settings)


def ignore(report):
    pass


@pytest.mark.parametrize("batch_norm", ["trained", "frozen"])
def test_a_run_on_activations_equals_one_on_images_whose_stem_is_frozen(photographs, batch_norm):
    config = training_config(photographs, **{"network.batch_norm": batch_norm})
    activations, pixels = frozen.open_data(config, photographs), frozen.load(config.data, photographs)
    assert activations.kind == activations.test.kind == "activations"
    assert activations.train.feature_size is None
    cached, direct = (training.new_run(config, activations.train) for _ in range(2))
    stem = cut_extractor(config.network).stem.requires_grad_(False)
    direct.networks.extractor = nn.Sequential(stem, direct.networks.extractor)
    start = training.embed(cached, activations.test)
    training.fit(cached, activations.train, activations.test, ignore)
    training.fit(direct, pixels.train, pixels.test, ignore)
    z = training.embed(cached, activations.test)
    assert (z - start).abs().max() > 0.01
    torch.testing.assert_close(z, training.embed(direct, pixels.test), rtol=1e-5, atol=1e-5)
    for report, other in zip(cached.reports, direct.reports, strict=True):
        assert report.losses == pytest.approx(other.losses, rel=1e-5)


def test_the_tail_alone_is_trained_at_the_rate_of_the_extractor(photographs):
    config = training_config(photographs)
    train = frozen.open_data(config, photographs).train
    run = training.new_run(config, train)
    tail = dict(run.networks.extractor.named_parameters())
    assert tail.keys() == {"body.3.weight", "body.3.bias", "body.4.weight", "body.4.bias"}
    at_its_rate = [group["params"] for group in run.optimisers["metric"].param_groups if group["lr"] == 1e-2]
    assert {id(parameter) for group in at_its_rate for parameter in group} == {id(p) for p in tail.values()}
    before = {name: parameter.clone() for name, parameter in tail.items()}
    training.fit(run, train, None, ignore)
    assert not any(torch.equal(before[name], parameter) for name, parameter in tail.items())


def test_views_are_drawn_in_training_and_the_centre_is_evaluated(photographs):
    config = training_config(photographs, **{"data.crop_size": 32, "data.flip": True, "data.feature_crops": 4})
    train = frozen.open_data(config, photographs).train
    run = training.new_run(config, train)
    positions = np.arange(len(train))
    centres = torch.from_numpy(train.values[train.rows][:, 0])
    assert torch.equal(training._inputs(run, train, positions, None), centres)
    drawn = training._inputs(run, train, positions, torch.Generator().manual_seed(0))
    views = [
        [np.array_equal(row.numpy(), view) for view in train.values[at]].index(True)
        for row, at in zip(drawn, train.rows, strict=True)
    ]
    assert len(set(views)) > 1


@pytest.mark.parametrize("changes", [{}, {"optim.precision": "float64"}, {"optim.channels_last": True}], ids=str)
def test_a_resumed_run_equals_one_that_never_stopped(photographs, tmp_path, changes):
    config = training_config(photographs, **{"data.crop_size": 32, "data.feature_crops": 3}, **changes)
    dataset = frozen.open_data(config, photographs)
    whole, first, second = (training.new_run(config, dataset.train) for _ in range(3))
    training.fit(whole, dataset.train, dataset.test, ignore)

    def save(report):
        if report.epoch == 1:
            checkpoint.save(first, tmp_path)

    training.fit(first, dataset.train, dataset.test, save)
    assert checkpoint.load(second, tmp_path)
    assert second.epoch == 1
    training.fit(second, dataset.train, dataset.test, ignore)
    assert_equal_runs(whole, second)


@pytest.mark.parametrize("part", ["all", LAYER])
def test_a_run_on_images_says_where_to_get_what_it_takes(photographs, part):
    config = training_config(photographs, **{"network.frozen": part})
    pixels = frozen.load(config.data, photographs)
    with pytest.raises(ConfigError, match=f"network.frozen must be '' for a run on images, got '{part}': frozen.open"):
        training.new_run(config, pixels.train)
