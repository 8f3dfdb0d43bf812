"""The extractors keep the laws, the other networks are the paper's, and weights fit or are refused by name."""

import copy
import dataclasses
import math
from typing import get_args

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models._api import WeightsEnum

from hdml_core import networks
from hdml_core.config import Config, ConfigError, NetworkConfig, SynthesisName, with_settings
from hdml_core.networks import (
    EXTRACTORS,
    TupleGenerator,
    build_extractor,
    build_networks,
    cut_extractor,
    decay_penalty,
    decayed,
    mix_precision,
)
from tests import conformance
from tests.conformance import batch_norms, images_for, states_of_batch_norms

DRAWN = {}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """Every test gets copies of networks drawn once: to draw GoogLeNet's weights takes seconds."""

    def copied(name, build):
        def build_copy():
            if name not in DRAWN:
                DRAWN[name] = build()
            return copy.deepcopy(DRAWN[name])

        return build_copy

    for name, body in EXTRACTORS.items():
        monkeypatch.setitem(networks.EXTRACTORS, name, body._replace(build=copied(name, body.build)))


@pytest.mark.parametrize("law", conformance.EXTRACTOR_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", EXTRACTORS)
def test_law(name, law):
    law(name, lambda **settings: build_extractor(NetworkConfig(extractor=name, **settings)))


def test_frozen_batch_norm_stays_through_a_training_step():
    extractor = build_extractor(NetworkConfig(batch_norm="frozen"))
    before = states_of_batch_norms(extractor)
    learning = [parameter for parameter in extractor.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(learning, lr=0.1, weight_decay=0.1)
    first = extractor.body[0].weight.clone()
    extractor(images_for("convnet")).sum().backward()
    optimiser.step()
    assert not torch.equal(extractor.body[0].weight, first)
    assert all(torch.equal(value, was) for value, was in zip(states_of_batch_norms(extractor), before, strict=True))


# Extractors cut in two

CUTS = [
    ("convnet", "0"),
    ("convnet", "7"),
    ("googlenet", "conv1"),
    ("googlenet", "inception4e"),
    ("googlenet", "maxpool4"),
    ("mobilenet_v2", "features.0.1"),
    ("mobilenet_v2", "features.2.conv.1"),
    ("mobilenet_v2", "features.14"),
    ("mobilenet_v2", "features.18.0"),
    ("resnet50", "bn1"),
    ("resnet50", "layer3"),
    ("resnet50", "layer4.1.relu"),
]


@pytest.mark.parametrize("batch_norm", ["trained", "frozen"])
@pytest.mark.parametrize(("name", "layer"), CUTS)
def test_stem_and_tail_are_the_whole_bitwise(name, layer, batch_norm):
    config = NetworkConfig(extractor=name, batch_norm=batch_norm)
    whole = build_extractor(config).eval()
    stem, tail = cut_extractor(dataclasses.replace(config, frozen=layer))
    images = images_for(name)
    with torch.no_grad():
        assert torch.equal(tail.eval()(stem.eval()(images)), whole(images))
    apart = dict(stem.named_parameters()) | dict(tail.named_parameters())
    assert apart.keys() == dict(whole.named_parameters()).keys()
    assert len(apart) == len(list(stem.parameters())) + len(list(tail.parameters()))
    assert {*stem.state_dict(), *tail.state_dict()} == whole.state_dict().keys()


@pytest.mark.parametrize(("name", "layer"), CUTS)
def test_the_stem_stays_and_the_tail_learns(name, layer):
    stem, tail = cut_extractor(NetworkConfig(extractor=name, frozen=layer))
    before = states_of_batch_norms(stem)
    images = images_for(name)
    activations = stem.train()(images).detach()
    assert not any(layer.training for layer in batch_norms(stem))
    assert all(torch.equal(value, was) for value, was in zip(states_of_batch_norms(stem), before, strict=True))
    assert all(layer.training for layer in batch_norms(tail.train()))
    gradients = torch.autograd.grad(tail(activations).square().sum(), list(tail.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_batch_norm_of_the_tail_can_be_frozen():
    _, tail = cut_extractor(NetworkConfig(extractor="resnet50", frozen="layer3", batch_norm="frozen"))
    assert not any(layer.training for layer in batch_norms(tail.train()))
    assert not any(parameter.requires_grad for layer in batch_norms(tail) for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("name", "layer", "hint"),
    [
        ("mobilenet_v2", "features.41", "; did you mean 'features.4'?"),
        ("mobilenet_v2", "features.15.conv.1", "; did you mean 'features.15'?"),
        ("resnet50", "layer4", "; did you mean 'layer4.1'?"),
        ("resnet50", "layer_3", "; did you mean 'layer3'?"),
        ("resnet50", "avgpool", "; did you mean 'maxpool'?"),
        ("googlenet", "inception4e.branch1", "; did you mean 'inception4e'?"),
        ("googlenet", "everything", ""),
    ],
)
def test_a_layer_that_it_cannot_be_cut_at_is_refused(name, layer, hint):
    listed = {
        "mobilenet_v2": ", ".join(f"features.{number}" for number in range(18)) + ", features.18.0",
        "resnet50": "conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4.0, layer4.1",
        "googlenet": "conv1, maxpool1, conv2, conv3, maxpool2, inception3a, inception3b, maxpool3, inception4a, "
        "inception4b, inception4c, inception4d, inception4e, maxpool4, inception5a",
    }
    with pytest.raises(ConfigError) as error:
        cut_extractor(NetworkConfig(extractor=name, frozen=layer))
    assert str(error.value) == (
        f"network.frozen must be '', 'all' or a layer of {name} whose output is all that later layers need, such as "
        f"{listed[name]}, got {layer!r}{hint}"
    )


# Embedder, generator, head


def linear_layers(built):
    parts = (built.embedder, built.generator, built.head)
    return [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]


def test_shapes_on_features():
    config = NetworkConfig(embedding_size=6, generator_hidden=10)
    built = build_networks(config, num_classes=5, feature_size=8)
    y = torch.randn(4, 8)
    z = built.embedder(built.extractor(y))
    assert built.extractor(y) is y
    assert z.shape == (4, 6)
    assert built.generator(z).shape == (4, 8)
    assert built.head(y).shape == (4, 5)


def test_shapes_on_images():
    built = build_networks(NetworkConfig(embedding_size=6), num_classes=5, feature_size=None)
    y = built.extractor(images_for("convnet"))
    assert built.head(y).shape == (2, 5)
    assert built.generator(built.embedder(y)).shape == y.shape == (2, 128)


def test_the_generator_is_the_papers():
    kinds = [type(layer) for layer in build_networks(NetworkConfig(), 5, 8).generator]
    assert kinds == [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear]


def test_the_embedder_has_batch_norm_only_in_the_authors_network():
    plain, authors = (
        build_networks(NetworkConfig(embedder_batch_norm=chosen), 5, 8).embedder for chosen in (False, True)
    )
    assert isinstance(plain, nn.Linear)
    assert [type(layer) for layer in authors] == [nn.BatchNorm1d, nn.Linear]


def test_weights_are_glorot_uniform_and_biases_zero():
    config = NetworkConfig(embedding_size=64, generator_hidden=128, embedder_batch_norm=True)
    for layer in linear_layers(build_networks(config, num_classes=50, feature_size=100)):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.99 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (layer.bias == 0).all()


def test_networks_are_drawn_from_the_global_generator():
    torch.manual_seed(7)
    first = build_networks(NetworkConfig(), 5, 8).state_dict()
    torch.manual_seed(7)
    again = build_networks(NetworkConfig(), 5, 8).state_dict()
    other = build_networks(NetworkConfig(), 5, 8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


METHODS = get_args(SynthesisName)


@pytest.mark.parametrize("synthesis", METHODS)
def test_of_one_seed_every_method_starts_from_the_same_embedder_and_head(synthesis):
    built = []
    for name in ("hdml", synthesis):
        torch.manual_seed(7)
        built.append(build_networks(NetworkConfig(embedder_batch_norm=True), 5, 8, name))
    for child in ("embedder", "head"):
        first, second = (getattr(networks, child).state_dict() for networks in built)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("n", [1, 5])
def test_the_generator_of_tuples_is_three_layers_on_the_concatenation(n):
    """Negatives shared by n anchors as in a batch of pairs, or each anchor's own."""
    generator = build_networks(NetworkConfig(generator_hidden=6), 5, 8, "daml").generator.double()
    first, rest = generator.first, generator.rest
    assert isinstance(generator, TupleGenerator)
    assert [type(layer) for layer in rest] == [nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in (first, rest[1], rest[3])] == [(6, 24), (6, 6), (8, 6)]
    with torch.no_grad():
        first.bias.normal_()
        negative, anchor, positive = (
            torch.randn(shape, dtype=torch.float64) for shape in [(n, 4, 8), *[(5, 1, 8)] * 2]
        )
        tiled = torch.cat([part.expand(5, 4, 8) for part in (negative, anchor, positive)], dim=-1)
        torch.testing.assert_close(generator(negative, anchor, positive), rest(first(tiled)), rtol=1e-12, atol=1e-12)


def test_batch_norm_does_not_decay():
    built = build_networks(NetworkConfig(embedder_batch_norm=True), 5, feature_size=None)
    convolutions = [layer.weight for layer in built.extractor.modules() if isinstance(layer, nn.Conv2d)]
    fc = built.embedder[1]
    assert {id(parameter) for parameter in decayed(built)} == {id(p) for p in (*convolutions, fc.weight, fc.bias)}


def test_the_penalty_is_half_the_squares_and_only_where_j_m_has_it():
    built = build_networks(NetworkConfig(embedding_size=6), 5, 8)
    decay = {"optim.weight_decay": 0.1}
    assert decay_penalty(built, with_settings(Config(), decay)) == 0.0
    penalty = decay_penalty(built, with_settings(Config(), {**decay, "hdml.weight_decay_in_j_m": True}))
    torch.testing.assert_close(penalty, 0.05 * built.embedder.weight.square().sum())


def test_mixed_precision_computes_in_bfloat16_and_hands_out_float32():
    built = build_networks(NetworkConfig(), 5, 8)
    y = torch.randn(16, 8)
    exact = built.embedder(y)
    mix_precision(built)
    mixed = built.embedder(y)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, mixed.bfloat16().float())
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)
    mixed.sum().backward()
    assert built.embedder.weight.grad.dtype == torch.float32


# Weights


def refusal(extractor, weights):
    with pytest.raises(ConfigError) as error:
        build_extractor(NetworkConfig(extractor=extractor, weights=str(weights)))
    return str(error.value)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "absent.safetensors"
    assert refusal("mobilenet_v2", path) == f"network.weights '{path}': no such file"


@pytest.mark.parametrize("size", [0, 5, 100, 5000])
def test_a_truncated_file_is_named(tmp_path, size):
    path = tmp_path / "cut.safetensors"
    save_file(EXTRACTORS["convnet"].build().state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    assert refusal("convnet", path).startswith(f"network.weights '{path}' is not a whole safetensors file: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None, "1.bias": None}, "2 entries missing, 0 unknown, 0 of another shape; the first is 0.weight"),
        ({"fc.weight": torch.ones(2)}, "0 entries missing, 1 unknown, 0 of another shape; the first is fc.weight"),
        ({"1.bias": torch.ones(3)}, "0 entries missing, 0 unknown, 1 of another shape; the first is 1.bias (3,)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    state = EXTRACTORS["convnet"].build().state_dict() | change
    path = tmp_path / "misfit.safetensors"
    save_file({name: value for name, value in state.items() if value is not None}, path)
    assert refusal("convnet", path) == f"network.weights '{path}' does not fit convnet: {message}"


def test_counts_of_batches_may_be_left_out(tmp_path):
    state = EXTRACTORS["convnet"].build().state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({name: value for name, value in state.items() if "num_batches" not in name}, path)
    loaded = build_extractor(NetworkConfig(weights=str(path))).body.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("extractor", "known"),
    [("resnet50", "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"), ("googlenet", "IMAGENET1K_V1, DEFAULT")],
)
@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "model.pth"])
def test_an_unknown_name_is_refused_with_the_known_ones(extractor, known, weights):
    message = f"network.weights '{weights}' must be a path ending in .safetensors or one of {known}"
    assert refusal(extractor, weights) == message


def test_convnet_has_no_torchvision_weights():
    assert refusal("convnet", "IMAGENET1K_V1") == (
        "network.weights 'IMAGENET1K_V1': convnet has no torchvision weights; give a .safetensors path or nothing"
    )


@pytest.mark.parametrize("name", ["googlenet", "resnet50"])
def test_torchvisions_weights_give_torchvisions_features(name, monkeypatch):
    """The download is replaced by random weights with all that torchvision's files hold."""
    parts = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    published = getattr(torchvision.models, name)(weights=None, **parts).state_dict()
    assert any(entry.startswith("aux") for entry in published) == (name == "googlenet")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, progress, check_hash: published)

    ours = build_extractor(NetworkConfig(extractor=name, weights="IMAGENET1K_V1")).eval()
    theirs = getattr(torchvision.models, name)(weights="IMAGENET1K_V1").eval()
    theirs.fc = nn.Identity()
    images = images_for(name)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.data
def test_published_mobilenet_weights_are_those_of_the_file(shared):
    path = shared / "weights" / "mobilenet_v2_imagenet_folded.fp16.safetensors"
    extractor = build_extractor(NetworkConfig(extractor="mobilenet_v2", weights=str(path), batch_norm="frozen"))
    loaded = extractor.body.state_dict()
    in_file = {name: value for name, value in load_file(path).items() if not name.startswith("classifier")}
    assert {name for name in loaded if not name.endswith("num_batches_tracked")} == in_file.keys()
    for name, value in in_file.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.float())
    assert not any(layer.training for layer in batch_norms(extractor))
