"""Every J and every gradient of HDML equals its plain-loop twin, for both losses and both recipes."""

import pytest
import torch

from hdml_core.methods.hdml import hdml_losses
from hdml_core.methods.plain import plain_losses
from hdml_core.metric_losses import METRIC_LOSSES
from tests import oracles
from tests.methods.made import CASES, assert_same_gradients, small_case

# Between them: nothing averaged yet, a graded schedule, and one that pulls all the way.
SCHEDULES = {"start": (float("inf"), float("inf")), "graded": (3.0, 40.0), "full": (1e-3, 1e-3)}


def ours(case, schedule):
    config, networks, metric_loss, batch = case
    j_avg, j_gen_avg = (torch.tensor(value, dtype=torch.float64) for value in SCHEDULES[schedule])
    return hdml_losses(networks, batch._replace(j_avg=j_avg, j_gen_avg=j_gen_avg), metric_loss, config)


def twin(case, schedule):
    config, networks, _, batch = case
    return oracles.hdml(networks, batch.x, batch.labels, config, *SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_values_equal_the_plain_loops(recipe, loss, schedule):
    case = small_case(recipe, loss)
    wanted = twin(case, schedule)
    losses, hardness = ours(case, schedule)
    for name, value in {**losses._asdict(), **hardness._asdict()}.items():
        if name in wanted:
            expected = torch.as_tensor(wanted[name], dtype=torch.float64)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_gradients_equal_the_plain_loops(recipe, loss, schedule):
    case = small_case(recipe, loss)
    moved = {"j_metric": ["extractor", "embedder"], "j_gen": ["generator"], "j_class": ["head"]}
    assert_same_gradients(ours(case, schedule)[0]._asdict(), twin(case, schedule), case[1], moved)


@pytest.mark.parametrize("loss", METRIC_LOSSES)
@pytest.mark.parametrize("roles", ["negative", "all"])
def test_every_loss_of_tuples_can_carry_it(loss, roles):
    case = small_case("paper", loss, **{"hdml.generated_roles": roles})
    losses, _ = ours(case, "graded")
    gradients = torch.autograd.grad(losses.j_metric, list(case[1].generator.parameters()), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(("recipe", "loss"), CASES)
def test_without_weight_on_synthesis_it_is_the_plain_loss(recipe, loss):
    case = small_case(recipe, loss, **{"hdml.beta": 0.0})
    config, networks, metric_loss, batch = case
    losses, hardness = ours(case, "graded")
    plain, _ = plain_losses(networks, batch, metric_loss, config)
    assert float(hardness.w_real) == 1.0
    torch.testing.assert_close(losses.j_metric, plain.j_metric, rtol=0, atol=0)
