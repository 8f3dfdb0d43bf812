"""Every J and every gradient of the objective equals its plain-loop twin, for both losses and both recipes."""

import pytest
import torch
from torch import nn

from hdml_core.config import recipe_config, with_settings
from hdml_core.metric_losses import METRIC_LOSSES
from hdml_core.networks import build_networks
from hdml_core.objective import decayed, hdml_losses, plain_losses
from tests import oracles

# Between them: nothing averaged yet, a graded schedule, and one that pulls all the way.
SCHEDULES = {"start": (float("inf"), float("inf")), "graded": (3.0, 40.0), "full": (1e-3, 1e-3)}
CASES = [(recipe, loss) for recipe in ("paper", "authors") for loss in ("npair", "triplet")]


def small_case(recipe: str, loss: str, **settings):
    """A batch of six pairs or four triplets through networks of a few units each, in float64."""
    base = recipe_config({"recipe": recipe, "loss.name": loss, "optim.precision": "float64"})
    config = with_settings(
        base,
        {
            "network.embedding_size": 4,
            "network.generator_hidden": 6,
            "hdml.alpha": 2.0,
            "hdml.beta": 30.0,
            "loss.l2_reg": 0.02,
            "loss.margin": 3.0,
            "optim.weight_decay": 0.01,
            "data.batch_size": 12,
            **settings,
        },
    )
    torch.manual_seed(3)
    networks = build_networks(config.network, num_classes=7, feature_size=5).double()
    networks.extractor = nn.Linear(3, 5).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 5] * 2 if loss == "npair" else [0, 1, 2, 3] * 2 + [4, 5, 6, 4])
    return config, networks, METRIC_LOSSES[loss](config.loss), x, labels


def ours(case, schedule):
    config, networks, metric_loss, x, labels = case
    j_avg, j_gen_avg = (torch.tensor(value, dtype=torch.float64) for value in SCHEDULES[schedule])
    weight_decay = config.optim.weight_decay if config.hdml.weight_decay_in_j_m else 0.0
    return hdml_losses(networks, x, labels, metric_loss, config.hdml, weight_decay, j_avg, j_gen_avg)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_values_equal_the_plain_loops(recipe, loss, schedule):
    case = small_case(recipe, loss)
    config, networks, _, x, labels = case
    wanted = oracles.objective(networks, x, labels, config, *SCHEDULES[schedule])
    losses, hardness = ours(case, schedule)
    for name, value in {**losses._asdict(), **hardness._asdict()}.items():
        if name in wanted:
            twin = torch.as_tensor(wanted[name], dtype=torch.float64)
            torch.testing.assert_close(value, twin, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_gradients_equal_the_plain_loops(recipe, loss, schedule):
    case = small_case(recipe, loss)
    config, networks, _, x, labels = case
    wanted = oracles.objective(networks, x, labels, config, *SCHEDULES[schedule])
    losses, _ = ours(case, schedule)
    moved = {
        "j_metric": [*networks.extractor.parameters(), *networks.embedder.parameters()],
        "j_gen": list(networks.generator.parameters()),
        "j_class": list(networks.head.parameters()),
    }
    for name, parameters in moved.items():
        own = torch.autograd.grad(getattr(losses, name), parameters, retain_graph=True)
        twin = torch.autograd.grad(wanted[name], parameters, retain_graph=True)
        assert any(gradient.abs().max() > 0 for gradient in own), name
        for a, b in zip(own, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("loss", METRIC_LOSSES)
@pytest.mark.parametrize("roles", ["negative", "all"])
def test_every_loss_can_carry_synthesis(loss, roles):
    config, networks, _, x, _ = small_case("paper", "npair", **{"hdml.generated_roles": roles})
    metric_loss = METRIC_LOSSES[loss](config.loss)
    labels = torch.tensor([0, 1, 2, 3, 4, 5] * 2 if metric_loss.layout == "pairs" else [0, 1, 2, 3] * 2 + [4, 5, 6, 4])
    losses, _ = ours((config, networks, metric_loss, x, labels), "graded")
    gradients = torch.autograd.grad(losses.j_metric, list(networks.generator.parameters()), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_without_weight_on_synthesis_it_is_the_plain_loss(recipe, loss):
    case = small_case(recipe, loss, **{"hdml.beta": 0.0})
    config, networks, metric_loss, x, _ = case
    losses, hardness = ours(case, "graded")
    weight_decay = config.optim.weight_decay if config.hdml.weight_decay_in_j_m else 0.0
    plain = plain_losses(networks, x, metric_loss, weight_decay)
    assert float(hardness.w_real) == 1.0
    torch.testing.assert_close(losses.j_metric, plain.j_metric, rtol=0, atol=0)


def test_batch_norm_does_not_decay():
    config, networks, *_ = small_case("authors", "npair")
    assert config.network.embedder_batch_norm
    norm, fc = networks.embedder
    decaying = {id(parameter) for parameter in decayed(networks)}
    assert not decaying & {id(norm.weight), id(norm.bias)}
    assert {id(fc.weight), id(fc.bias), id(networks.extractor.weight), id(networks.extractor.bias)} == decaying
