"""Every metric loss keeps the laws, equals its plain-loop twin, and is whose definition its docstring says."""

import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, reducers

from hdml_core.config import LossConfig
from hdml_core.metric_losses import METRIC_LOSSES, NPairLoss
from hdml_core.notation import Roles
from tests import conformance, oracles
from tests.conformance import TUPLES, draw_rows, synthetic_roles

# The settings of the plain-loop twins; at this margin some triplets are satisfied and some are not.
MARGIN, L2_REG, ANGLE, THRESHOLD, SHARPNESS = 0.7, 0.3, 35.0, 6.0, 2.0
TWINS = {
    "triplet": lambda a, p, n: oracles.triplet(a, p, n, MARGIN),
    "npair": lambda a, p, n: oracles.npair(a, p, n, L2_REG),
    "contrastive": lambda a, p, n: oracles.contrastive(a, p, n, MARGIN),
    "semihard": lambda a, p, n: oracles.semihard(a, p, n, MARGIN),
    "lifted": lambda a, p, n: oracles.lifted(a, p, n, MARGIN),
    "angular": lambda a, p, n: oracles.angular(a, p, n, ANGLE, L2_REG),
    "ddml": lambda a, p, n: oracles.ddml(a, p, n, THRESHOLD, SHARPNESS),
}


def loss_named(name, **settings):
    return METRIC_LOSSES[name](LossConfig(name=name, **settings))


@pytest.mark.parametrize("law", conformance.METRIC_LOSS_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_law(name, law):
    law(loss_named(name))


def value_and_gradients(loss, roles):
    """The value, and the gradient of each role as it stands."""
    leaves = Roles(*(role.detach().clone().requires_grad_() for role in roles))
    value = loss(leaves)
    return value, torch.autograd.grad(value, leaves)


def in_loops(twin, layout):
    """The twin over roles: lists of vectors, with a list of negatives for each anchor where they come in pairs."""

    def loss(roles):
        if layout == "triplets":
            return twin(*roles)
        anchors, positives = roles.anchor.squeeze(1), roles.positive.squeeze(1)
        return twin(anchors, positives, roles.negative.expand(len(anchors), -1, -1))

    return loss


@pytest.mark.parametrize("tuples", ["real", "synthetic"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_value_and_gradients_equal_the_plain_loops(name, seed, tuples):
    loss = loss_named(name, margin=MARGIN, l2_reg=L2_REG, angle=ANGLE, threshold=THRESHOLD, sharpness=SHARPNESS)
    rows = draw_rows(loss, seed)
    roles = loss.roles(rows) if tuples == "real" else synthetic_roles(loss, seed)
    value, gradients = value_and_gradients(loss, roles)
    wanted, wanted_gradients = value_and_gradients(in_loops(TWINS[name], loss.layout), roles)
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-10, atol=1e-10)


def test_gradient_equals_finite_differences():
    loss = loss_named("npair", l2_reg=L2_REG)
    rows = draw_rows(loss).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: loss(loss.roles(rows)), rows)


def test_npair_at_chance_is_the_log_of_its_classes():
    loss = NPairLoss(l2_reg=0.0)
    torch.testing.assert_close(loss(loss.roles(torch.zeros(2 * 64, 8))), torch.tensor(64.0).log())


@pytest.mark.parametrize("name", ["npair", "angular"])
def test_large_inner_products_do_not_overflow(name):
    loss = loss_named(name)
    rows = (1e4 * draw_rows(loss).float()).requires_grad_()
    value, gradients = value_and_gradients(loss, loss.roles(rows))
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ddml_is_exact_at_any_scale(scale):
    """Where the logistic loss is all but a hinge its tails are there yet, and nothing overflows."""
    loss = loss_named("ddml", sharpness=1e3)
    value, gradients = value_and_gradients(loss, loss.roles(scale * draw_rows(loss)))
    assert value > 0
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("negatives", "chosen"), [((0.5, 2.0), 2.0), ((3.0, 2.0), 2.0), ((0.5, 0.7), 0.7)])
def test_semihard_takes_the_nearest_farther_negative_or_else_the_farthest(negatives, chosen):
    """Two pairs on the unit circle, by their angles from the anchor; the positive is at 1."""

    def at(*angles):
        angle = torch.tensor(angles, dtype=torch.float64)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def chord2(angle):
        return 2 - 2 * math.cos(angle)

    one, other = negatives
    # Rows 0 and 2 are a pair, so that each row faces both angles.
    roles = Roles(at(0.0).expand(4, 1, 2), at(1.0).expand(4, 1, 2), at(one, one, other, other).expand(4, 4, 2))
    assert loss_named("semihard", margin=10.0)(roles).item() == pytest.approx(chord2(1.0) - chord2(chosen) + 10)


# pytorch-metric-learning's definitions, on rows whose labels say which are a pair.
PAIR_LABELS = torch.arange(TUPLES).repeat(2)


def test_npair_is_that_of_pytorch_metric_learning():
    loss = loss_named("npair")
    rows = draw_rows(loss)
    anchors = torch.arange(TUPLES)
    no_negatives = torch.empty(0, dtype=torch.long)
    theirs = losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    wanted = theirs(rows, PAIR_LABELS, (anchors, anchors + TUPLES, no_negatives, no_negatives))
    torch.testing.assert_close(loss(loss.roles(rows)), wanted, rtol=1e-10, atol=1e-10)


def test_lifted_is_that_of_pytorch_metric_learning_unnormalised():
    loss = loss_named("lifted", margin=MARGIN)
    rows = draw_rows(loss)
    theirs = losses.LiftedStructureLoss(neg_margin=MARGIN, distance=distances.LpDistance(normalize_embeddings=False))
    torch.testing.assert_close(loss(loss.roles(rows)), theirs(rows, PAIR_LABELS), rtol=1e-10, atol=1e-10)


def test_angular_is_that_of_pytorch_metric_learning_on_the_unit_sphere_with_second_rows_as_references():
    loss = loss_named("angular", angle=ANGLE)
    rows = torch.nn.functional.normalize(draw_rows(loss))
    first, second = rows.chunk(2)
    labels = torch.arange(TUPLES)
    wanted = losses.AngularLoss(alpha=ANGLE)(first, labels, ref_emb=second, ref_labels=labels.clone())
    torch.testing.assert_close(loss(loss.roles(rows)), wanted, rtol=1e-6, atol=1e-6)


def test_triplet_is_that_of_pytorch_metric_learning_summed_over_squared_distances():
    loss = loss_named("triplet", margin=MARGIN)
    rows = draw_rows(loss)
    theirs = losses.TripletMarginLoss(
        margin=MARGIN,
        distance=distances.LpDistance(normalize_embeddings=False, power=2),
        reducer=reducers.SumReducer(),
    )
    triplets = tuple(torch.arange(TUPLES) + block * TUPLES for block in range(3))
    wanted = theirs(rows, indices_tuple=triplets)
    torch.testing.assert_close(loss(loss.roles(rows)), wanted, rtol=1e-10, atol=1e-10)
