"""The networks have the shapes and starts that the legend says; frozen is frozen; unfit weights are named."""

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from hdml_core.config import ConfigError, NetworkConfig
from hdml_core.networks import EXTRACTORS, build_extractor, build_networks, mix_precision

WEIGHTS = "mobilenet_v2_imagenet_folded.fp16.safetensors"


@pytest.mark.parametrize("name", EXTRACTORS)
def test_an_extractor_gives_features_of_its_size(name):
    body = EXTRACTORS[name]
    extractor = build_extractor(NetworkConfig(extractor=name)).eval()
    assert extractor(torch.zeros(2, body.channels, 64, 64)).shape == (2, body.feature_size)
    assert extractor.feature_size == body.feature_size


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_stays_as_it_is(frozen):
    config = NetworkConfig(batch_norm="frozen" if frozen else "trained")
    extractor = build_extractor(config)
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    extractor.train()
    extractor(torch.randn(4, 1, 28, 28)).sum().backward()
    norms = [layer for layer in extractor.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(layer.training != frozen for layer in norms)
    assert all(layer.weight.requires_grad != frozen for layer in norms)
    same = all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    assert same == frozen


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_new_layers_start_as_the_authors_do(batch_norm):
    torch.manual_seed(0)
    config = NetworkConfig(embedding_size=32, generator_hidden=48, embedder_batch_norm=batch_norm)
    networks = build_networks(config, num_classes=9, feature_size=20)
    layers = [layer for layer in networks.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(20, 32), (32, 48), (48, 20), (20, 9)]
    for layer in layers:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()
    assert isinstance(networks.extractor, nn.Identity)
    assert isinstance(networks.embedder, nn.Sequential) == batch_norm


def test_bfloat16_inside_float32_outside():
    networks = build_networks(NetworkConfig(), num_classes=5, feature_size=16)
    exact = networks.embedder(torch.ones(3, 16))
    mix_precision(networks)
    mixed = networks.embedder(torch.ones(3, 16))
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)


@pytest.mark.data
def test_real_weights_are_loaded_as_they_are(shared):
    path = shared / "weights" / WEIGHTS
    extractor = build_extractor(NetworkConfig(extractor="mobilenet_v2", weights=str(path), frozen=True))
    state = extractor.body.state_dict()
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("classifier")}
    assert len(kept) > 200
    assert all(torch.equal(state[name], value.float()) for name, value in kept.items())


@pytest.mark.parametrize("name", ["googlenet", "resnet50"])
def test_torchvisions_weights_by_name(name, monkeypatch):
    whole = torchvision.models.get_model(name, weights=None, **({"init_weights": True} if name == "googlenet" else {}))
    state = whole.state_dict()
    kind = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(kind, "get_state_dict", lambda *_, **__: state)
    extractor = build_extractor(NetworkConfig(extractor=name, weights="IMAGENET1K_V1"))
    assert torch.equal(next(extractor.body.parameters()), next(whole.parameters()))


@pytest.fixture
def convnet_state():
    return EXTRACTORS["convnet"].build().state_dict()


def loading(tmp_path, state, extractor="convnet"):
    save_file(state, tmp_path / "w.safetensors")
    return build_extractor(NetworkConfig(extractor=extractor, weights=str(tmp_path / "w.safetensors")))


def test_weights_round_trip(tmp_path, convnet_state):
    loaded = loading(tmp_path, convnet_state).body.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in convnet_state.items())


def test_missing_unknown_and_misshapen_entries_are_counted(tmp_path, convnet_state):
    del convnet_state["0.weight"]
    convnet_state["9.weight"] = torch.zeros(3)
    convnet_state["surplus"] = torch.zeros(3)
    message = "does not fit convnet: 1 entries missing, 1 unknown, 1 of another shape; the first is 0.weight"
    with pytest.raises(ConfigError, match=message):
        loading(tmp_path, convnet_state)


def test_weights_of_another_network(tmp_path, convnet_state):
    with pytest.raises(ConfigError, match="does not fit mobilenet_v2"):
        loading(tmp_path, convnet_state, "mobilenet_v2")


def test_a_truncated_file(tmp_path, convnet_state):
    path = tmp_path / "w.safetensors"
    save_file(convnet_state, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        build_extractor(NetworkConfig(weights=str(path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NetworkConfig(weights="absent.safetensors"), "network.weights 'absent.safetensors': no such file"),
        (NetworkConfig(weights="IMAGENET1K_V1"), "convnet has no torchvision weights; give a .safetensors path"),
        (
            NetworkConfig(extractor="resnet50", weights="IMAGENET"),
            "must be a path ending in .safetensors or one of IMAGENET1K_V1, IMAGENET1K_V2",
        ),
    ],
)
def test_weights_that_are_not_there(config, message):
    with pytest.raises(ConfigError, match=message):
        build_extractor(config)
