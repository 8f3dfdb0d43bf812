"""Laws over lists: what every metric loss and every extractor must fulfil. A new member is one line in its table.

A law of a metric loss takes the loss; a law of an extractor takes its name and a function that builds it from settings.
"""

from typing import get_args

import torch
from torch import nn

from hdml_core.metric_losses import TupleLoss
from hdml_core.networks import EXTRACTORS
from hdml_core.notation import Layout, Roles

TUPLES = 5
SIZE = 4
ROWS_PER_TUPLE = {"pairs": 2, "triplets": 3}


def draw_rows(loss: TupleLoss, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(TUPLES * ROWS_PER_TUPLE[loss.layout], size, dtype=torch.float64, generator=random)


def classes_of(loss: TupleLoss) -> torch.Tensor:
    """The class of every row: role-major, the negatives of triplets from other classes."""
    first = torch.arange(TUPLES)
    return torch.cat([first, first] if loss.layout == "pairs" else [first, first, first + TUPLES])


def synthetic_roles(loss: TupleLoss, seed: int = 0) -> Roles:
    """Roles as a step's synthesis makes them: every anchor faces negatives of its own."""
    roles = loss.roles(draw_rows(loss, seed))
    random = torch.Generator().manual_seed(seed + 1)
    shape = torch.broadcast_shapes(roles.anchor.shape, roles.negative.shape)
    return roles._replace(negative=torch.randn(shape, dtype=torch.float64, generator=random))


# Metric losses


def is_a_metric_loss(loss):
    assert isinstance(loss, TupleLoss)
    assert loss.layout in get_args(Layout)
    assert set(loss.soft_weights) == set(Roles._fields)
    assert all(weight >= 0 for weight in loss.soft_weights.values())


def is_a_scalar_and_not_negative(loss):
    for seed in range(5):
        value = loss(loss.roles(draw_rows(loss, seed)))
        assert value.shape == ()
        assert value >= 0


def the_loss_of_rows_is_that_of_their_roles(loss):
    rows = draw_rows(loss)
    assert torch.equal(loss.of_rows(rows, classes_of(loss)), loss(loss.roles(rows)))


def roles_are_never_tiled(loss):
    rows = draw_rows(loss)
    for role in loss.roles(rows):
        assert role.untyped_storage().nbytes() <= rows.untyped_storage().nbytes()


def anchors_and_negatives_are_views(loss):
    rows = draw_rows(loss)
    roles = loss.roles(rows)
    for role in (roles.anchor, roles.negative):
        assert role.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def roles_have_the_right_classes(loss):
    roles = loss.roles(classes_of(loss)[:, None])
    assert torch.equal(roles.anchor, roles.positive)
    is_negative = loss.negative_mask(loss.roles(draw_rows(loss)))
    assert torch.equal(is_negative, (roles.anchor != roles.negative).squeeze(-1))


def an_anchor_is_never_its_own_positive(loss):
    roles = loss.roles(torch.arange(len(draw_rows(loss)))[:, None])
    assert (roles.anchor != roles.positive).all()


def the_order_of_the_tuples_is_indifferent(loss):
    rows = draw_rows(loss)
    order = torch.randperm(TUPLES)
    permuted = rows[torch.cat([order + block * TUPLES for block in range(ROWS_PER_TUPLE[loss.layout])])]
    torch.testing.assert_close(loss(loss.roles(permuted)), loss(loss.roles(rows)))


def a_rotation_is_indifferent(loss):
    rows = draw_rows(loss)
    rotation, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))
    torch.testing.assert_close(loss(loss.roles(rows @ rotation)), loss(loss.roles(rows)))


def broadcast_negatives_equal_negatives_written_out(loss):
    roles = loss.roles(draw_rows(loss))
    shape = torch.broadcast_shapes(roles.anchor.shape, roles.negative.shape)
    written_out = roles._replace(negative=roles.negative.expand(shape).clone())
    torch.testing.assert_close(loss(written_out), loss(roles))


def entries_of_the_own_class_count_for_nothing(loss):
    roles = synthetic_roles(loss)
    is_negative = loss.negative_mask(roles)[..., None]
    others = torch.where(is_negative, roles.negative, 100 * torch.rand_like(roles.negative))
    assert torch.equal(loss(roles._replace(negative=others)), loss(roles))


def nearer_negatives_cost_more(loss):
    roles = synthetic_roles(loss)
    assert loss(roles._replace(negative=roles.anchor + 0.05 * (roles.negative - roles.anchor))) > loss(roles)


def every_parameter_gets_a_gradient(loss):
    # No bias in the last layer: a shift of all embeddings moves no distance.
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, SIZE, bias=False)).double()
    loss(loss.roles(network(draw_rows(loss, size=3)))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 1e-6, name


def gradients_are_finite_where_all_embeddings_coincide(loss):
    rows = torch.ones_like(draw_rows(loss)).requires_grad_()
    loss(loss.roles(rows)).backward()
    assert rows.grad.isfinite().all()


METRIC_LOSS_LAWS = (
    is_a_metric_loss,
    is_a_scalar_and_not_negative,
    the_loss_of_rows_is_that_of_their_roles,
    roles_are_never_tiled,
    anchors_and_negatives_are_views,
    roles_have_the_right_classes,
    an_anchor_is_never_its_own_positive,
    the_order_of_the_tuples_is_indifferent,
    a_rotation_is_indifferent,
    broadcast_negatives_equal_negatives_written_out,
    entries_of_the_own_class_count_for_nothing,
    nearer_negatives_cost_more,
    every_parameter_gets_a_gradient,
    gradients_are_finite_where_all_embeddings_coincide,
)


# Extractors

PIXELS = 32


def images_for(name):
    return torch.randn(2, EXTRACTORS[name].channels, PIXELS, PIXELS)


def batch_norms(extractor):
    return [layer for layer in extractor.modules() if isinstance(layer, nn.BatchNorm2d)]


def states_of_batch_norms(extractor):
    return [value.clone() for layer in batch_norms(extractor) for value in layer.state_dict().values()]


def gives_features_and_learns_in_every_parameter(name, build):
    extractor = build()
    means = [layer.running_mean.clone() for layer in batch_norms(extractor)]
    y = extractor(images_for(name))
    assert y.shape == (2, EXTRACTORS[name].feature_size)
    assert y.isfinite().all()
    for layer, mean in zip(batch_norms(extractor), means, strict=True):
        assert not torch.equal(layer.running_mean, mean)
    gradients = torch.autograd.grad(y.square().sum(), list(extractor.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def frozen_batch_norm_neither_learns_nor_follows_the_batches(name, build):
    extractor = build(batch_norm="frozen")
    before = states_of_batch_norms(extractor)
    extractor.eval()
    extractor.train()
    with torch.no_grad():
        extractor(images_for(name))
    after = states_of_batch_norms(extractor)
    assert extractor.training
    assert not any(layer.training for layer in batch_norms(extractor))
    assert not any(parameter.requires_grad for layer in batch_norms(extractor) for parameter in layer.parameters())
    assert all(torch.equal(value, was) for value, was in zip(after, before, strict=True))


EXTRACTOR_LAWS = (
    gives_features_and_learns_in_every_parameter,
    frozen_batch_norm_neither_learns_nor_follows_the_batches,
)
