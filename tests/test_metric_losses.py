"""Each loss equals its plain-loop twin, in value and gradient, and pytorch-metric-learning where definitions agree."""

import math

import pytest
import torch
from pytorch_metric_learning import losses as peers
from pytorch_metric_learning.distances import LpDistance

from hdml_core.config import LossConfig
from hdml_core.metric_losses import METRIC_LOSSES
from tests import objective_oracle

N, D = 4, 3
CONFIG = LossConfig(margin=0.7, l2_reg=0.03, angle=35.0)


def batch(name, seed=0):
    """Rows of a batch laid out for the loss, and its class by row."""
    random = torch.Generator().manual_seed(seed)
    layout = METRIC_LOSSES[name](CONFIG).layout
    classes = list(range(N)) * 2 + (list(range(N, 2 * N)) if layout == "triplets" else [])
    return torch.randn(len(classes), D, generator=random, dtype=torch.float64).requires_grad_(), classes


def unit(z):
    return [row / row.norm() for row in z]


def partner(i):
    return (i + N) % (2 * N)


def others(i):
    return [j for j in range(2 * N) if j % N != i % N]


def triplet(z):
    return objective_oracle.triplet(z[:N], z[N : 2 * N], z[2 * N :], CONFIG.margin)


def npair(z):
    positives = z[N:]
    return objective_oracle.npair(z[:N], positives, [list(positives)] * N, CONFIG.l2_reg)


def angular(z):
    t2 = math.tan(math.radians(CONFIG.angle)) ** 2
    total = 0.0
    for i in range(N):
        a, p = z[i], z[N + i]
        terms = [torch.exp(4 * t2 * ((a + p) @ z[N + j]) - 2 * (1 + t2) * (a @ p)) for j in range(N) if j != i]
        total = total + torch.log(1 + sum(terms))
    squares = sum(row @ row for row in z) / N
    return total / N + 0.25 * CONFIG.l2_reg * squares


def contrastive(z):
    z = unit(z)
    near = [(z[i] - z[partner(i)]).square().sum() for i in range(2 * N)]
    far = [torch.clamp(CONFIG.margin - (z[i] - z[j]).norm(), min=0) ** 2 for i in range(2 * N) for j in others(i)]
    return sum(near) / len(near) + sum(far) / len(far)


def semihard(z):
    z, total = unit(z), 0.0
    for i in range(2 * N):
        d_plus = (z[i] - z[partner(i)]).square().sum()
        negatives = sorted(((z[i] - z[j]).square().sum() for j in others(i)), key=float_of)
        farther = [d for d in negatives if d > d_plus]
        total = total + torch.clamp(d_plus - (farther or negatives[-1:])[0] + CONFIG.margin, min=0)
    return total / (2 * N)


def lifted(z):
    total = 0.0
    for i in range(N):
        j = partner(i)
        repulsion = sum(torch.exp(CONFIG.margin - (z[a] - z[b]).norm()) for a in (i, j) for b in others(a))
        total = total + torch.clamp(torch.log(repulsion) + (z[i] - z[j]).norm(), min=0) ** 2
    return total / (2 * N)


def float_of(value):
    return float(value.detach())


TWINS = {twin.__name__: twin for twin in (triplet, npair, angular, contrastive, semihard, lifted)}


def test_every_loss_has_a_twin():
    assert TWINS.keys() == METRIC_LOSSES.keys()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_equals_its_plain_loops(name, seed):
    z, _ = batch(name, seed)
    loss = METRIC_LOSSES[name](CONFIG)
    ours, twin = loss(loss.roles(z)), TWINS[name](z)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value, z)[0] for value in (ours, twin)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_gradients_equal_finite_differences(name):
    z, _ = batch(name, 11)
    loss = METRIC_LOSSES[name](CONFIG)
    assert torch.autograd.gradcheck(lambda rows: loss(loss.roles(rows)), z)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_the_order_of_the_tuples_does_not_matter(name):
    z, _ = batch(name)
    loss = METRIC_LOSSES[name](CONFIG)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = torch.cat([block[order] for block in z.split(N)])
    torch.testing.assert_close(loss(loss.roles(shuffled)), loss(loss.roles(z)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_roles_are_of_the_classes_that_they_should_be(name):
    z, classes = batch(name)
    loss = METRIC_LOSSES[name](CONFIG)
    labels = loss.roles(torch.tensor(classes)[:, None])
    shape = torch.broadcast_shapes(*(part.shape for part in labels))
    anchor, positive, negative = (part.expand(shape)[..., 0] for part in labels)
    is_negative = loss.negative_mask(labels)
    assert (anchor == positive).all()
    assert torch.equal(is_negative, anchor != negative)
    assert loss.roles(z).anchor.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_rows_of_an_anchors_own_class_are_no_negatives(name):
    """Whatever stands at the masked entries, even infinity, changes neither value nor gradient."""
    z, _ = batch(name)
    loss = METRIC_LOSSES[name](CONFIG)
    roles = loss.roles(z)
    mask = loss.negative_mask(roles)
    if mask.all():
        return
    moved = roles._replace(negative=torch.where(mask[..., None], roles.negative, roles.negative + 5.0))
    torch.testing.assert_close(loss(moved) - reg(name, moved), loss(roles) - reg(name, roles), rtol=1e-9, atol=1e-9)


def reg(name, roles):
    if name not in ("npair", "angular"):
        return 0.0
    return 0.25 * CONFIG.l2_reg * sum(part.square().sum(-1).mean() for part in (roles.anchor, roles.negative))


def test_lifted_structure_equals_pytorch_metric_learning():
    z, classes = batch("lifted")
    peer = peers.LiftedStructureLoss(
        neg_margin=CONFIG.margin, pos_margin=0.0, distance=LpDistance(normalize_embeddings=False)
    )
    loss = METRIC_LOSSES["lifted"](CONFIG)
    torch.testing.assert_close(loss(loss.roles(z)), peer(z, torch.tensor(classes)), rtol=1e-6, atol=1e-6)


def test_triplet_equals_torch_on_squared_distances():
    z, _ = batch("triplet")
    loss = METRIC_LOSSES["triplet"](CONFIG)
    squared = torch.nn.TripletMarginWithDistanceLoss(
        distance_function=lambda p, q: (p - q).square().sum(-1), margin=CONFIG.margin, reduction="sum"
    )
    torch.testing.assert_close(loss(loss.roles(z)), squared(*z.chunk(3)), rtol=1e-12, atol=1e-12)


def test_npair_is_the_cross_entropy_of_the_similarities():
    z, _ = batch("npair")
    loss = METRIC_LOSSES["npair"](LossConfig())
    similarities = z[:N] @ z[N:].T
    wanted = torch.nn.functional.cross_entropy(similarities, torch.arange(N))
    torch.testing.assert_close(loss(loss.roles(z)), wanted, rtol=1e-12, atol=1e-12)
