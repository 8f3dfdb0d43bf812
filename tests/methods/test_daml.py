"""Every J and every gradient of DAML equals its plain-loop twin, and each J moves its own network, when it is time."""

import pytest
import torch

from hdml_core import training
from hdml_core.methods import METHODS, method_of
from hdml_core.methods.daml import daml_losses
from hdml_core.metric_losses import METRIC_LOSSES
from tests import oracles
from tests.methods.made import CASES, assert_same_gradients, small_case
from tests.test_training import finished, labelled, same, small_config

DAML = {"synthesis": "daml", "daml.lambda_reg": 0.7, "daml.lambda_adv": 3.0, "loss.margin": 20.0}


def ours(case):
    config, networks, metric_loss, batch = case
    return daml_losses(networks, batch, metric_loss, config)[0]._asdict()


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_values_and_gradients_equal_the_plain_loops(recipe, loss, margin):
    case = small_case(recipe, loss, **DAML, **{"daml.margin": margin})
    config, networks, _, batch = case
    # Positives near their anchors, so that some synthetic negatives are told apart too well, and some are not.
    n = 6 if loss == "npair" else 4
    batch.x[n : 2 * n] = batch.x[:n] + 0.3 * batch.x[n : 2 * n]
    own, twin = ours(case), oracles.daml(networks, batch.x, config)
    assert own.keys() == twin.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, twin[name], rtol=1e-10, atol=1e-10, msg=name)
    moved = {name: ["extractor", "embedder"] for name in ("j_m", "j_syn", "j_metric")}
    moved |= {name: ["generator"] for name in ("j_hard", "j_reg", "j_adv", "j_gen")}
    assert_same_gradients(own, twin, networks, moved)


@pytest.mark.parametrize("loss", METRIC_LOSSES)
def test_every_loss_of_tuples_can_carry_it(loss):
    case = small_case("paper", loss, **DAML)
    losses = ours(case)
    parameters = list(case[1].generator.parameters())
    for name in ("j_gen", "j_metric"):
        gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_the_own_class_counts_for_nothing():
    """In a batch of pairs the generator also sees each anchor with its own positive as negative; no J does."""
    config, networks, metric_loss, batch = small_case("paper", "npair", **DAML, **{"loss.l2_reg": 0.0})
    before = ours((config, networks, metric_loss, batch))
    forward, own = networks.generator.forward, torch.eye(6, dtype=torch.bool)[..., None]
    networks.generator.forward = lambda *roles: torch.where(own, 100.0, forward(*roles))
    after = ours((config, networks, metric_loss, batch))
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("loss", ["npair", "triplet"])
def test_each_network_is_moved_by_its_own_loss_only(loss):
    train = labelled()
    rates = {"lr_embedder": {"embedder"}, "lr_generator": {"generator"}, "lr_head": set()}
    for moving, networks in rates.items():
        settings = {f"optim.{name}": 1e-2 if name == moving else 0.0 for name in rates}
        config = small_config(**{"synthesis": "daml", "loss.name": loss, **settings})
        before = dict(training.new_run(config, train).networks.named_parameters())
        after = dict(finished(config, train).networks.named_parameters())
        assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == networks


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_it_pretrains_on_real_tuples_alone(epochs):
    plain = finished(small_config(synthesis="none")).reports
    run = finished(small_config(**{"synthesis": "daml", "daml.pretrain_share": (epochs + 0.5) / 3}))
    assert [same(report) for report in run.reports[:epochs]] == [same(report) for report in plain[:epochs]]
    for report in run.reports[epochs:]:
        assert tuple(report.losses) == METHODS["daml"].losses._fields
        assert not report.hardness
        assert not report.trace


def test_the_generator_rests_while_the_metric_pretrains():
    config = small_config(**{"synthesis": "daml", "daml.pretrain_share": 0.7})
    assert [method_of(config, epoch) is METHODS["none"] for epoch in range(3)] == [True, True, False]
    train, rested = labelled(), []
    run, new = training.new_run(config, train), training.new_run(config, train)

    def compare(report):
        pairs = zip(run.networks.generator.parameters(), new.networks.generator.parameters(), strict=True)
        rested.append(all(torch.equal(value, was) for value, was in pairs))

    training.fit(run, train, None, compare)
    assert rested == [True, True, False]


def test_the_generator_learns_to_make_hard_negatives():
    losses = [
        report.losses
        for report in finished(
            small_config(**{"synthesis": "daml", "optim.epochs": 20, "daml.pretrain_share": 0.0})
        ).reports
    ]
    assert losses[-1]["j_gen"] < 0.5 * losses[1]["j_gen"]
    assert losses[-1]["j_adv"] < 0.5 * losses[1]["j_adv"]
