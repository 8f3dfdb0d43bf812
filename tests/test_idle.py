"""What `idle` names changes no bit of a run, and whatever else a run has for settings does."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hdml_core import training
from hdml_core.config import Config, idle, recipe_config, to_settings, with_settings
from hdml_core.datasets import glyphs
from hdml_core.frozen import open_data
from hdml_core.networks import EXTRACTORS
from tests.test_training import labelled, same, small_config

# Another value of every setting, which matters where anything reads it.
OTHER = {
    "recipe": "authors",
    "seed": 1,
    "synthesis": "none",
    "data.name": "glyphs",
    "data.path": "elsewhere",
    "data.image_size": 30,
    "data.crop_size": 24,
    "data.flip": True,
    "data.batch_size": 18,
    "data.folds": 3,
    "data.fold": 1,
    "data.disjoint_by": "alphabet",
    "data.feature_crops": 2,
    "data.resident": False,
    "network.extractor": "resnet50",
    "network.weights": "elsewhere.safetensors",
    "network.frozen": "all",
    "network.batch_norm": "frozen",
    "network.embedding_size": 7,
    "network.embedder_batch_norm": True,
    "network.generator_hidden": 9,
    "loss.name": "contrastive",
    "loss.margin": 0.8,
    "loss.l2_reg": 0.1,
    "loss.angle": 35.0,
    "loss.threshold": 2.0,
    "loss.sharpness": 3.0,
    "loss.options": "alpha=8",
    "hdml.alpha": 2.0,
    "hdml.beta": 9.0,
    "hdml.lambda_soft": 3.0,
    "hdml.recon_weight": 3.0,
    "hdml.recon_reduction": "sum",
    "hdml.generated_roles": "all",
    "hdml.average_of": "weighted_j_m",
    "hdml.average_window": 2,
    "hdml.average_start": 4.0,
    "hdml.weight_decay_in_j_m": True,
    "daml.lambda_reg": 3.0,
    "daml.lambda_adv": 3.0,
    "daml.margin": 0.1,
    "daml.pretrain_share": 0.0,
    "optim.epochs": 4,
    "optim.steps_per_epoch": 4,
    "optim.lr_extractor": 2e-3,
    "optim.lr_embedder": 2e-3,
    "optim.lr_generator": 2e-3,
    "optim.lr_head": 2e-3,
    "optim.lr_loss": 2e-3,
    "optim.weight_decay": 0.2,
    "optim.clip": 1e-3,
    "optim.halve_at": (2,),
    "optim.precision": "float64",
    "optim.channels_last": True,
    "optim.compile": True,
    "retrieval.ks": (1, 3),
    "retrieval.clusterings": 2,
}
# Read, but as a name alone, or to the same bits or nearly so, or outside of a run; or nothing else would go with it.
READ_WITHOUT_A_TRACE = {
    "recipe",
    "data.name",
    "data.path",
    "data.folds",
    "data.fold",
    "data.resident",
    "network.extractor",
    "network.weights",
    "network.frozen",
    "loss.name",
    "optim.channels_last",
    "optim.compile",
    "retrieval.ks",
    "retrieval.clusterings",
}


def test_every_setting_has_another_value():
    assert list(OTHER) == list(to_settings(Config()))
    assert all(OTHER[name] != value for name, value in to_settings(short_config()).items())


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of runs of a few rows each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def short_config(**settings):
    return small_config(**{"optim.steps_per_epoch": 3, "optim.weight_decay": 0.1, **settings})


def result(config, train):
    """All that a run says while it trains, and the networks that embed."""
    run = training.new_run(config, train)
    training.fit(run, train, None, lambda report: None)
    networks = run.networks.extractor.state_dict() | run.networks.embedder.state_dict()
    return [same(report) for report in run.reports], networks


def are_equal(one, other):
    (reports, networks), (others, other_networks) = one, other
    return (
        reports == others
        and networks.keys() == other_networks.keys()
        and all(torch.equal(value, other_networks[name]) for name, value in networks.items())
    )


RUNS = {
    "hdml-npair": {},
    "hdml-triplet": {"loss.name": "triplet"},
    "none-npair": {"synthesis": "none"},
    "none-ddml": {"synthesis": "none", "loss.name": "ddml"},
    "daml-angular": {"synthesis": "daml", "loss.name": "angular"},
    "daml-semihard": {"synthesis": "daml", "loss.name": "semihard"},
    "proxies": {"synthesis": "none", "loss.name": "pml.ProxyAnchorLoss"},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_what_is_idle_changes_nothing_and_all_else_does(settings):
    train = labelled()
    config = short_config(**settings)
    unchanged = result(config, train)
    for name, other in OTHER.items():
        if name in idle(config) or name not in READ_WITHOUT_A_TRACE | {"synthesis"}:
            changed = result(with_settings(config, {name: other}), train)
            assert are_equal(changed, unchanged) == (name in idle(config)), name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root, with weights for the convnet."""
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    save_file(EXTRACTORS["convnet"].build().state_dict(), root / "convnet.safetensors")
    return root


@pytest.fixture
def few_glyphs(monkeypatch):
    monkeypatch.setattr(glyphs, "CHARACTERS", "ABCDEFGHIJKLMNOPQRSTUVWX")


def opened(config, root):
    """A short run on the data that the config opens."""
    return result(config, open_data(config, root).train)


@pytest.mark.parametrize("frozen", ["", "2", "all"])
def test_what_is_idle_of_images_changes_nothing(root, few_glyphs, frozen):
    config = recipe_config(
        {
            "synthesis": "none",
            "data.batch_size": 12,
            "data.flip": False,
            "network.frozen": frozen,
            "network.weights": str(root / "convnet.safetensors"),
            "optim.epochs": 1,
            "optim.steps_per_epoch": 2,
            "optim.channels_last": False,
        }
    )
    unchanged = opened(config, root)
    for name in idle(config):
        if name.partition(".")[0] in ("data", "network") or name in ("optim.lr_extractor", "optim.channels_last"):
            assert are_equal(opened(with_settings(config, {name: OTHER[name]}), root), unchanged), name
    for name in ("data.crop_size", "data.feature_crops", "network.batch_norm", "optim.lr_extractor"):
        if name not in idle(config):
            assert not are_equal(opened(with_settings(config, {name: OTHER[name]}), root), unchanged), name


def test_a_frozen_extractor_has_no_rate_and_no_batch_norm_to_set():
    config = Config()
    of_extractor = {"network.batch_norm", "optim.lr_extractor", "optim.channels_last"}
    assert not of_extractor & idle(config)
    assert not of_extractor & idle(replace(config, network=replace(config.network, frozen="layer3")))
    assert of_extractor < idle(replace(config, network=replace(config.network, frozen="all")))
    assert of_extractor < idle(with_settings(config, {"data.name": "features"}))


def test_what_only_some_data_sets_read():
    omniglot, folder = (idle(with_settings(Config(), {"data.name": name})) for name in ("omniglot", "folder"))
    assert omniglot - folder == {"data.path"}
    assert folder - omniglot == {"data.disjoint_by"}
