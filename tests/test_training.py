"""Determinism, resume, the schedule over time, and what moves what, in whole runs on small synthetic features."""

import math

import numpy as np
import pytest
import torch

from hdml_core import checkpoint, training
from hdml_core.config import ConfigError, recipe_config
from hdml_core.datasets import LabelledSet
from hdml_core.methods import METHODS
from hdml_core.notation import Hardness, HdmlLosses

FEATURES, CLASSES, ROWS = 12, 16, 6


def labelled(seed=0, classes=CLASSES, images=False) -> LabelledSet:
    """Noisy class centres as features, or random small images."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), ROWS)
    if images:
        values = rng.integers(0, 256, (len(labels), 1, 32, 32), dtype=np.uint8)
    else:
        centres = rng.normal(size=(classes, FEATURES))[labels]
        values = (centres + rng.normal(size=(len(labels), FEATURES)))[:, None].astype(np.float32)
    return LabelledSet(values, np.arange(len(labels)), labels, tuple(map(str, range(classes))))


def small_config(**settings):
    defaults = {
        "data.name": "features",
        "data.batch_size": 12,
        "network.embedding_size": 8,
        "network.generator_hidden": 10,
        "optim.epochs": 3,
        "hdml.alpha": 1.0,
        "hdml.beta": 5.0,
        "retrieval.clusterings": 1,
        "retrieval.ks": (1, 2),
    }
    return recipe_config(defaults | settings)


def finished(config, train=None, device="cpu"):
    train = train or labelled()
    run = training.new_run(config, train, device)
    training.fit(run, train, labelled(1, 5), lambda report: None)
    return run


def same(report):
    """A report without the time it took."""
    return report._replace(seconds=0.0)


def assert_equal_runs(a, b):
    assert [same(report) for report in a.reports] == [same(report) for report in b.reports]
    for (name, p), q in zip(a.networks.state_dict().items(), b.networks.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert (a.epoch, a.step) == (b.epoch, b.step)
    for p, q in zip(a.averages, b.averages, strict=True):
        assert torch.equal(torch.as_tensor(p), torch.as_tensor(q))


VARIANTS = {
    "npair-paper": {},
    "npair-authors": {"recipe": "authors", "hdml.lambda_soft": 1.0, "hdml.average_window": 4, "optim.halve_at": (10,)},
    "triplet-paper": {"loss.name": "triplet"},
    "triplet-authors": {"recipe": "authors", "loss.name": "triplet", "hdml.lambda_soft": 1.0},
    "baseline": {"synthesis": "none", "optim.weight_decay": 1e-3},
    "daml": {"synthesis": "daml"},
    "daml-triplet": {"synthesis": "daml", "loss.name": "triplet"},
    "ddml": {"loss.name": "ddml"},
    "proxies": {"synthesis": "none", "loss.name": "pml.ProxyAnchorLoss", "loss.options": "alpha=16"},
    "semihard-baseline": {"synthesis": "none", "loss.name": "semihard"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_run_bitwise(variant):
    config = small_config(**VARIANTS[variant])
    assert_equal_runs(finished(config), finished(config))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_resumed_run_equals_one_that_never_stopped(variant, stop_at, tmp_path):
    config = small_config(**VARIANTS[variant])
    train, validation = labelled(), labelled(1, 5)

    class Stop(Exception):
        pass

    first = training.new_run(config, train)

    def save_then_stop(report):
        checkpoint.save(first, tmp_path)
        if report.epoch == stop_at:
            raise Stop

    with pytest.raises(Stop):
        training.fit(first, train, validation, save_then_stop)
    torch.manual_seed(99)
    resumed = training.new_run(config, train)
    assert checkpoint.load(resumed, tmp_path)
    assert resumed.epoch == stop_at
    training.fit(resumed, train, validation, lambda report: None)
    assert_equal_runs(resumed, finished(config))


def test_images_resume_bitwise_too(tmp_path):
    config = small_config(**{"data.name": "glyphs", "optim.epochs": 2, "data.flip": True})
    train, validation = labelled(images=True), labelled(1, 5, images=True)
    whole = training.new_run(config, train)
    seen = []

    def keep(report):
        if report.epoch == 1:
            checkpoint.save(whole, tmp_path)
        seen.append(report)

    training.fit(whole, train, validation, keep)
    resumed = training.new_run(config, train)
    checkpoint.load(resumed, tmp_path)
    training.fit(resumed, train, validation, lambda report: None)
    assert_equal_runs(resumed, whole)


def test_another_seed_gives_another_run():
    a, b = finished(small_config()), finished(small_config(seed=1))
    assert a.reports[-1].losses != b.reports[-1].losses


@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_each_network_is_moved_by_its_own_loss_only(recipe):
    """With two of the three learning rates at zero, only the third's networks move."""
    train = labelled()
    rates = {
        "lr_embedder": "embedder",
        "lr_generator": "generator",
        "lr_head": "head",
    }
    for moving, network in rates.items():
        settings = {f"optim.{name}": 1e-2 if name == moving else 0.0 for name in rates}
        config = small_config(recipe=recipe, **settings)
        before = dict(training.new_run(config, train).networks.named_parameters())
        after = dict(finished(config, train).networks.named_parameters())
        moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {network}


def test_the_first_epoch_has_no_average_and_pulls_nothing():
    run = finished(small_config())
    first, second = run.reports[:2]
    assert first.hardness["j_avg"] == math.inf
    assert first.hardness["kept"] == first.hardness["w_real"] == first.hardness["lambda_0_mean"] == 1.0
    assert first.hardness["pulled_share"] == 0.0
    assert second.hardness["j_avg"] == pytest.approx(first.losses["j_m"], rel=1e-5)
    assert second.hardness["kept"] == pytest.approx(math.exp(-1.0 / first.losses["j_m"]), rel=1e-5)
    assert second.hardness["w_real"] == pytest.approx(math.exp(-5.0 / first.losses["j_gen"]), rel=1e-5)
    assert second.hardness["pulled_share"] > 0


def test_the_authors_average_in_tumbling_windows_of_the_weighted_loss():
    config = small_config(recipe="authors", **{"hdml.average_window": 3, "hdml.lambda_soft": 1.0})
    train = labelled()
    run = training.new_run(config, train)
    table = training._train_epoch(run, train)
    weighted = table["j_m"] * table["w_real"]
    assert (table["j_avg"][:3] == 1e6).all()
    np.testing.assert_allclose(table["j_avg"][3:6], weighted[:3].mean(), rtol=1e-5)
    np.testing.assert_allclose(table["j_avg"][6:8], weighted[3:6].mean(), rtol=1e-5)
    np.testing.assert_allclose(table["j_gen_avg"][3:6], table["j_gen"][:3].mean(), rtol=1e-5)


def test_a_report_holds_what_its_run_has():
    run = finished(small_config())
    report = run.reports[0]
    assert set(report.losses) == set(HdmlLosses._fields)
    assert set(report.hardness) == set(report.trace) == set(Hardness._fields)
    assert {len(values) for values in report.trace.values()} == {report.step} == {8}
    plain = finished(small_config(synthesis="none")).reports[0]
    assert set(plain.losses) == {"j_m", "j_metric"}
    assert not plain.hardness
    assert not plain.trace


def test_training_learns():
    reports = finished(small_config(**{"optim.epochs": 12, "optim.lr_embedder": 1e-2})).reports
    assert reports[-1].losses["j_m"] < 0.8 * reports[0].losses["j_m"]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("settings", [{"optim.precision": "bfloat16"}, {"optim.channels_last": True}])
@pytest.mark.parametrize("synthesis", METHODS)
def test_faster_settings_train_the_same_thing_nearly(synthesis, settings):
    images = {"data.name": "glyphs", "optim.epochs": 1, "hdml.beta": 1.0, "daml.pretrain_share": 0.0}
    train = labelled(images=True)
    losses = []
    for extra in ({}, settings):
        run = training.new_run(small_config(synthesis=synthesis, **images, **extra), train)
        losses.append(training._train_epoch(run, train)["j_metric"])
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=2e-2)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("synthesis", ["hdml", "daml"])
def test_a_compiled_objective_trains_the_same_thing(synthesis):
    train = labelled()
    losses = []
    for compiled in (False, True):
        run = training.new_run(
            small_config(
                **{
                    "synthesis": synthesis,
                    "optim.compile": compiled,
                    "optim.epochs": 2,
                    "optim.precision": "float64",
                }
            ),
            train,
        )
        training.fit(run, train, labelled(1, 5), lambda report: None)
        losses.append([run.reports[-1].losses[name] for name in METHODS[synthesis].losses._fields])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_clipping_bounds_every_gradient_element():
    config = small_config(**{"optim.clip": 1e-4})
    run = finished(config)
    gradients = [p.grad for p in run.networks.parameters() if p.grad is not None]
    assert gradients
    assert max(float(gradient.abs().max()) for gradient in gradients) <= 1e-4


def test_learning_rates_halve_at_their_steps():
    run = finished(small_config(**{"optim.halve_at": (4, 10), "optim.epochs": 2}))
    assert run.optimisers["metric"].param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


def test_a_loss_that_is_not_finite_is_named_with_its_schedule():
    train = labelled()
    train.values[:, :] = 1e30
    with pytest.raises(training.NonFiniteLossError) as raised:
        finished(small_config(**{"hdml.alpha": 2.5, "hdml.beta": 7.0}), train)
    message = str(raised.value)
    assert "at epoch 1, step 1: alpha 2.5, beta 7, J_avg inf, J_gen inf" in message
    assert message.startswith("j_")


@pytest.mark.parametrize("synthesis", ["none", "daml"])
def test_a_loss_that_is_not_finite_is_named_without_a_schedule_where_there_is_none(synthesis):
    train = labelled()
    train.values[:, :] = 1e30
    message = r"^j_m is (inf|nan) at epoch 1, step 1\. A lower learning rate or optim.clip often helps\.$"
    with pytest.raises(training.NonFiniteLossError, match=message):
        finished(small_config(**{"synthesis": synthesis, "daml.pretrain_share": 0.0}), train)


def test_an_extractor_for_other_images_is_said_at_the_start():
    config = small_config(**{"data.name": "glyphs", "network.extractor": "resnet50"})
    message = "network.extractor must be one of convnet for images of 1 channels, got 'resnet50', which takes 3"
    with pytest.raises(ConfigError, match=message):
        training.new_run(config, labelled(images=True))


def test_too_few_classes_for_a_batch_is_said_at_the_start():
    with pytest.raises(ConfigError, match="data.batch_size must be <= 32, got 64: its 32 pairs need 32 classes"):
        training.new_run(small_config(**{"data.batch_size": 64}), labelled())
