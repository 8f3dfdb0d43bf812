"""Laws of the config tree: what goes in comes out, what is wrong is refused by name, recipes hold."""

import importlib.util
import math
import sys
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hdml_core.config
from hdml_core.config import (
    DATA_SETTINGS,
    Config,
    ConfigError,
    DatasetName,
    MetricLossName,
    SynthesisName,
    parse_setting,
    recipe_config,
    to_settings,
    with_settings,
)

ABOVE_ZERO = st.floats(1e-12, 1e12)
AT_LEAST_ZERO = st.floats(0, 1e12)
COUNT = st.integers(1, 10**6)

# A valid value of every setting; those that bind each other (crop, fold, batch) are drawn so that all agree.
DRAWN = {
    "recipe": st.sampled_from(["paper", "authors"]),
    "seed": st.integers(0, 2**63),
    "synthesis": st.sampled_from(get_args(SynthesisName)),
    "data.name": st.sampled_from(get_args(DatasetName)),
    "data.path": st.text(),
    "data.image_size": st.integers(64, 512),
    "data.crop_size": st.integers(8, 64),
    "data.flip": st.booleans(),
    "data.batch_size": st.integers(1, 100).map(lambda tuples: 6 * tuples),
    "data.folds": st.integers(5, 50),
    "data.fold": st.integers(0, 4),
    "data.disjoint_by": st.sampled_from(["character", "alphabet"]),
    "data.feature_crops": COUNT,
    "data.resident": st.booleans(),
    "network.extractor": st.sampled_from(["convnet", "googlenet", "resnet50", "mobilenet_v2"]),
    "network.weights": st.text(),
    "network.frozen": st.sampled_from(["", "all", "layer3"]),
    "network.batch_norm": st.sampled_from(["trained", "frozen"]),
    "network.embedding_size": COUNT,
    "network.embedder_batch_norm": st.booleans(),
    "network.generator_hidden": COUNT,
    "loss.name": st.sampled_from(get_args(MetricLossName)),
    "loss.margin": AT_LEAST_ZERO,
    "loss.l2_reg": AT_LEAST_ZERO,
    "loss.angle": st.floats(1, 89),
    "loss.threshold": AT_LEAST_ZERO,
    "loss.sharpness": ABOVE_ZERO,
    "loss.options": st.text(),
    "hdml.alpha": AT_LEAST_ZERO,
    "hdml.beta": AT_LEAST_ZERO,
    "hdml.lambda_soft": AT_LEAST_ZERO,
    "hdml.recon_weight": AT_LEAST_ZERO,
    "hdml.recon_reduction": st.sampled_from(["mean", "sum"]),
    "hdml.generated_roles": st.sampled_from(["negative", "all"]),
    "hdml.average_of": st.sampled_from(["j_m", "weighted_j_m"]),
    "hdml.average_window": st.integers(0, 10**6),
    "hdml.average_start": ABOVE_ZERO | st.just(math.inf),
    "hdml.weight_decay_in_j_m": st.booleans(),
    "daml.lambda_reg": AT_LEAST_ZERO,
    "daml.lambda_adv": AT_LEAST_ZERO,
    "daml.margin": AT_LEAST_ZERO,
    "daml.pretrain_share": st.floats(0, 0.99),
    "optim.epochs": COUNT,
    "optim.steps_per_epoch": st.integers(0, 10**6),
    "optim.lr_extractor": AT_LEAST_ZERO,
    "optim.lr_embedder": AT_LEAST_ZERO,
    "optim.lr_generator": AT_LEAST_ZERO,
    "optim.lr_head": AT_LEAST_ZERO,
    "optim.lr_loss": AT_LEAST_ZERO,
    "optim.weight_decay": AT_LEAST_ZERO,
    "optim.clip": ABOVE_ZERO | st.just(math.inf),
    "optim.halve_at": st.lists(COUNT).map(tuple),
    "optim.precision": st.sampled_from(["float32", "bfloat16", "float64"]),
    "optim.channels_last": st.booleans(),
    "optim.compile": st.booleans(),
    "retrieval.ks": st.sets(COUNT, min_size=1).map(sorted).map(tuple),
    "retrieval.clusterings": COUNT,
}
SETTINGS = st.fixed_dictionaries(DRAWN)


def written(value):
    """A setting as a user types it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_every_setting_is_drawn():
    assert list(DRAWN) == list(to_settings(Config()))


@given(SETTINGS)
def test_settings_round_trip(settings):
    config = with_settings(Config(), settings)
    assert to_settings(config) == settings
    assert with_settings(config, to_settings(config)) == config
    assert hash(config) == hash(with_settings(Config(), settings))


@given(SETTINGS)
def test_a_typed_setting_is_the_setting(settings):
    for name, value in settings.items():
        assert parse_setting(f"{name}={written(value)}") == (name, value)


@given(SETTINGS, st.data())
def test_settings_leave_the_others_alone(settings, data):
    name = data.draw(st.sampled_from(["hdml.alpha", "optim.epochs", "seed", "retrieval.ks", "data.path"]))
    changed = with_settings(Config(), {name: settings[name]})
    assert to_settings(changed) == to_settings(Config()) | {name: settings[name]}


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().hdml.alpha = 7.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"data.image_size": 7}, "data.image_size must be >= 8, got 7"),
        ({"data.crop_size": 7}, "data.crop_size must be in [8, data.image_size = 32], got 7"),
        ({"data.crop_size": 33}, "data.crop_size must be in [8, data.image_size = 32], got 33"),
        ({"data.batch_size": 2}, "data.batch_size must be >= 4, got 2"),
        ({"data.batch_size": 65}, "data.batch_size must be a multiple of 2 for loss.name = 'npair', got 65"),
        (
            {"loss.name": "triplet"},
            "data.batch_size must be a multiple of 3 for loss.name = 'triplet', got 64",
        ),
        ({"data.folds": 1}, "data.folds must be >= 2, got 1"),
        ({"data.fold": 5}, "data.fold must be in [0, data.folds = 5), got 5"),
        ({"data.fold": -1}, "data.fold must be in [0, data.folds = 5), got -1"),
        ({"data.feature_crops": 0}, "data.feature_crops must be >= 1, got 0"),
        ({"network.embedding_size": 0}, "network.embedding_size must be >= 1, got 0"),
        ({"network.generator_hidden": 0}, "network.generator_hidden must be >= 1, got 0"),
        ({"loss.margin": -0.5}, "loss.margin must be >= 0, got -0.5"),
        ({"loss.margin": math.inf}, "loss.margin must be >= 0, got inf"),
        ({"loss.l2_reg": -1.0}, "loss.l2_reg must be >= 0, got -1.0"),
        ({"loss.angle": 0.0}, "loss.angle must be in (0, 90), got 0.0"),
        ({"loss.angle": 90.0}, "loss.angle must be in (0, 90), got 90.0"),
        ({"loss.threshold": -1.0}, "loss.threshold must be >= 0, got -1.0"),
        ({"loss.sharpness": 0.0}, "loss.sharpness must be > 0, got 0.0"),
        ({"daml.lambda_reg": -1.0}, "daml.lambda_reg must be >= 0, got -1.0"),
        ({"daml.lambda_adv": -1.0}, "daml.lambda_adv must be >= 0, got -1.0"),
        ({"daml.margin": math.inf}, "daml.margin must be >= 0, got inf"),
        ({"daml.pretrain_share": 1.0}, "daml.pretrain_share must be in [0, 1), got 1.0"),
        (
            {"loss.name": "triplets"},
            "loss.name must be one of 'npair', 'triplet', 'contrastive', 'semihard', 'lifted', 'angular', 'ddml', or "
            "'pml.NAME' for a loss of pytorch-metric-learning, got 'triplets'; did you mean 'triplet'?",
        ),
        ({"hdml.alpha": -1.0}, "hdml.alpha must be >= 0, got -1.0"),
        ({"hdml.alpha": math.inf}, "hdml.alpha must be >= 0, got inf"),
        ({"hdml.beta": -1.0}, "hdml.beta must be >= 0, got -1.0"),
        ({"hdml.lambda_soft": -1.0}, "hdml.lambda_soft must be >= 0, got -1.0"),
        ({"hdml.recon_weight": -1.0}, "hdml.recon_weight must be >= 0, got -1.0"),
        ({"hdml.average_window": -1}, "hdml.average_window must be >= 0, got -1"),
        ({"hdml.average_start": 0.0}, "hdml.average_start must be > 0, got 0.0"),
        ({"optim.epochs": 0}, "optim.epochs must be >= 1, got 0"),
        ({"optim.steps_per_epoch": -1}, "optim.steps_per_epoch must be >= 0, got -1"),
        ({"optim.lr_extractor": -1.0}, "optim.lr_extractor must be >= 0, got -1.0"),
        ({"optim.lr_embedder": -1.0}, "optim.lr_embedder must be >= 0, got -1.0"),
        ({"optim.lr_generator": -1.0}, "optim.lr_generator must be >= 0, got -1.0"),
        ({"optim.lr_head": math.inf}, "optim.lr_head must be >= 0, got inf"),
        ({"optim.lr_loss": -1.0}, "optim.lr_loss must be >= 0, got -1.0"),
        ({"optim.weight_decay": -1.0}, "optim.weight_decay must be >= 0, got -1.0"),
        ({"optim.clip": 0.0}, "optim.clip must be > 0, got 0.0"),
        ({"optim.halve_at": (5, 0)}, "optim.halve_at must be steps > 0, got (5, 0)"),
        ({"retrieval.ks": ()}, "retrieval.ks must be ascending and >= 1, got ()"),
        ({"retrieval.ks": (0, 1)}, "retrieval.ks must be ascending and >= 1, got (0, 1)"),
        ({"retrieval.ks": (2, 2)}, "retrieval.ks must be ascending and >= 1, got (2, 2)"),
        ({"retrieval.clusterings": 0}, "retrieval.clusterings must be >= 1, got 0"),
    ],
)
def test_a_value_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        with_settings(Config(), settings)
    assert str(refused.value) == message


@pytest.fixture(scope="module")
def unhooked():
    """The module as users load it: under pytest the type-checking hook refuses wrong types before it can."""
    spec = importlib.util.spec_from_file_location("unhooked_config", hdml_core.config.__file__)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "mine"}, "recipe must be one of 'paper', 'authors', got 'mine'"),
        ({"seed": 1.0}, "seed must be of type int, got 1.0"),
        ({"seed": True}, "seed must be of type int, got True"),
        ({"data.name": 7}, f"data.name must be one of {', '.join(map(repr, get_args(DatasetName)))}, got 7"),
        ({"data.path": None}, "data.path must be of type str, got None"),
        ({"data.flip": 1}, "data.flip must be of type bool, got 1"),
        ({"hdml.alpha": 90}, "hdml.alpha must be of type float, got 90"),
        ({"hdml.alpha": "90"}, "hdml.alpha must be of type float, got '90'"),
        ({"hdml.alpha": math.nan}, "hdml.alpha must be a number, got nan"),
        ({"retrieval.ks": [1, 2]}, "retrieval.ks must be a tuple of whole numbers, got [1, 2]"),
        ({"retrieval.ks": (1, 2.0)}, "retrieval.ks must be a tuple of whole numbers, got (1, 2.0)"),
    ],
)
def test_a_value_of_another_type_is_refused(unhooked, settings, message):
    with pytest.raises(unhooked.ConfigError) as refused:
        unhooked.with_settings(unhooked.Config(), settings)
    assert str(refused.value) == message


SECTIONS = "[data, network, loss, hdml, daml, optim, retrieval]"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "hdml.alhpa",
            r"unknown setting 'hdml.alhpa': hdml has \[alpha, .*\]; did you mean 'alpha'\?",
        ),
        (
            "hdml.nothing_like_it",
            r"unknown setting 'hdml.nothing_like_it': hdml has \[alpha, [^?]*\]",
        ),
        ("sed", r"unknown setting 'sed': Config has \[recipe, seed, synthesis\]; did you mean 'seed'\?"),
        (
            "optin.epochs",
            rf"unknown setting 'optin.epochs': the sections are \{SECTIONS}; did you mean 'optim'\?",
        ),
        ("a.b.c", rf"unknown setting 'a.b.c': the sections are \{SECTIONS}"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known(name, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        with_settings(Config(), {name: 1.0})
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse_setting(f"{name}=1.0")


@pytest.mark.parametrize(
    ("typed", "setting"),
    [
        ("hdml.alpha=7", ("hdml.alpha", 7.0)),
        ("hdml.average_start=inf", ("hdml.average_start", math.inf)),
        ("data.flip=TRUE", ("data.flip", True)),
        ("data.path=a=b", ("data.path", "a=b")),
        ("network.weights=", ("network.weights", "")),
        ("optim.halve_at=", ("optim.halve_at", ())),
        ("retrieval.ks=5", ("retrieval.ks", (5,))),
    ],
)
def test_what_a_user_may_type(typed, setting):
    assert parse_setting(typed) == setting


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hdml.alpha", "a setting must be written dotted.name=value, got 'hdml.alpha'"),
        ("hdml.alpha=many", "hdml.alpha must be of type float, got 'many'"),
        ("optim.epochs=2.5", "optim.epochs must be of type int, got '2.5'"),
        ("data.flip=yes", "data.flip must be true or false, got 'yes'"),
        ("retrieval.ks=1,two", "retrieval.ks must be whole numbers with commas between, got '1,two'"),
    ],
)
def test_what_a_user_may_not_type(typed, message):
    with pytest.raises(ConfigError) as refused:
        parse_setting(typed)
    assert str(refused.value) == message


@pytest.mark.parametrize("loss", get_args(MetricLossName))
@pytest.mark.parametrize("data", get_args(DatasetName))
@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_every_recipe_serves_every_data_set_and_loss(recipe, data, loss):
    config = recipe_config({"recipe": recipe, "data.name": data, "loss.name": loss})
    assert (config.recipe, config.data.name, config.loss.name) == (recipe, data, loss)
    assert recipe_config(to_settings(config)) == config


def test_every_data_set_has_its_settings():
    assert set(DATA_SETTINGS) == set(get_args(DatasetName))


# The flags of the authors' N-pair code: name, Cars196, CUB-200-2011, SOP. Their lambda_bal = 0.5 and softmax
# factor of 1e4 make lambda_soft = 1e4 * 0.5 and recon_weight = 1 - 0.5.
AUTHORS_FLAGS = [
    ("data.batch_size", 128, 128, None),
    ("network.embedding_size", 128, 256, 512),
    ("optim.weight_decay", 5e-3, 1e-3, 9e-3),
    ("optim.lr_extractor", 7e-5, 6e-5, 2e-5),
    ("optim.lr_embedder", 7e-5, 6e-5, 2e-5),
    ("loss.l2_reg", 3e-3, 1.5e-2, 3e-3),
    ("hdml.beta", 1e4, 5e3, 5e4),
    ("optim.lr_generator", 1e-2, 1e-2, 5e-4),
    ("optim.lr_head", 1e-3, 1e-3, 1e-3),
    ("optim.clip", math.inf, math.inf, 2.0),
    ("hdml.lambda_soft", 5e3, 5e3, 5e3),
    ("hdml.recon_weight", 0.5, 0.5, 0.5),
    ("hdml.recon_reduction", "sum", "sum", "sum"),
    ("hdml.alpha", 90.0, 90.0, 90.0),
    ("hdml.average_window", 64, 64, 64),
    ("hdml.average_start", 1e6, 1e6, 1e6),
    ("hdml.average_of", "weighted_j_m", "weighted_j_m", "weighted_j_m"),
    ("hdml.weight_decay_in_j_m", True, True, True),
    ("hdml.generated_roles", "all", "all", "all"),
    ("network.embedder_batch_norm", True, True, True),
    ("network.extractor", "googlenet", "googlenet", "googlenet"),
    ("data.image_size", 256, 256, 256),
    ("data.crop_size", 227, 227, 227),
    ("data.flip", True, True, True),
    ("optim.halve_at", (5632, 6848), (5632, 6848), None),
    ("retrieval.ks", (1, 2, 4, 8), (1, 2, 4, 8), (1, 10, 100)),
]


@pytest.mark.parametrize(("column", "data"), [(1, "cars196"), (2, "cub200"), (3, "sop")])
def test_the_authors_recipe_is_their_table_of_flags(column, data):
    settings = to_settings(recipe_config({"recipe": "authors", "data.name": data}))
    stated = {row[0]: row[column] for row in AUTHORS_FLAGS if row[column] is not None}
    assert {name: settings[name] for name in stated} == stated


@pytest.mark.parametrize("data", ["cub200", "cars196", "sop"])
def test_the_paper_recipe_is_the_paper(data):
    config = recipe_config({"recipe": "paper", "data.name": data})
    assert (config.network.extractor, config.network.embedding_size) == ("googlenet", 512)
    assert (config.data.image_size, config.data.crop_size, config.data.folds) == (256, 227, 5)
    assert config.optim.lr_embedder == pytest.approx(10 * config.optim.lr_extractor)
    assert (config.hdml.recon_reduction, config.hdml.average_of) == ("mean", "j_m")
    assert (config.hdml.generated_roles, config.hdml.average_window) == ("negative", 0)


@pytest.mark.parametrize("recipe", ["paper", "authors"])
@pytest.mark.parametrize("data", ["cub200", "sop"])
def test_triplets_come_in_batches_of_120_and_alpha_7(recipe, data):
    config = recipe_config({"recipe": recipe, "data.name": data, "loss.name": "triplet"})
    assert (config.data.batch_size, config.hdml.alpha) == (120, 7.0)


def test_the_callers_settings_win():
    config = recipe_config({"recipe": "authors", "data.name": "cars196", "hdml.beta": 7.0, "data.batch_size": 32})
    assert (config.hdml.beta, config.data.batch_size, config.optim.lr_extractor) == (7.0, 32, 7e-5)
