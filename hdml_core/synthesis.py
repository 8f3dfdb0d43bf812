"""From real embeddings to synthetic ones: the generator, then embedder and head on what it makes, in two ways.

`literal` lays out the feature of every synthetic row, as the paper writes it. `factored` comes to the same without: for
the n x n negatives of pairs, each a feature of f numbers, it needs their h hidden activations alone.

    The generator's first layer is linear, so pulling may come after it:
        W1 z_hat + b1 = (1 - lambda_0) (W1 z + b1) + lambda_0 (W1 z- + b1), of n anchors and n negatives.
    What comes after its ReLU is linear, once the statistics of its batch norm are known, up to z_tilde and the logits:
        y_tilde = W2 norm(hidden) + b2,  z_tilde = Wg y_tilde + bg,  logits = Wc y_tilde + bc,
        so Wc W2 serves all rows at once, and an anchor's inner products with its n z_tilde are those of (anchor Wg) W2
        with their hidden activations. A batch norm on y_tilde follows from mean and covariance of hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hdml_core.augmentor import harden
from hdml_core.linear_image import Affine, LinearImage, Moments, moments_of, pooled
from hdml_core.networks import Networks
from hdml_core.notation import Roles

Generated = Sequence[str]
"""Names of the roles that pass the generator."""


class Synthetic(NamedTuple):
    """What the generator makes of a batch; of each role that passes it, what embedder and head make of that."""

    y_prime: Float[Tensor, "b f"]
    z_tilde: Mapping[str, Float[Tensor, "*b d"] | LinearImage]
    logits: Mapping[str, Float[Tensor, "*b k"]]


def synthesise(
    networks: Networks,
    z: Float[Tensor, "b d"],
    roles: Callable[[Tensor], Roles],
    lambda_0: Float[Tensor, "*b 1"],
    generated: Generated,
) -> Synthetic:
    """Pull the negatives among the rows `z` by `lambda_0`, pass the generated roles on, and reconstruct the rows.

    One pass of the generator serves the reconstructions and the synthetic features, as in the authors' code, so that
    all of them share the statistics of its batch norm.
    """
    # Products of layers cost what some hundred rows do: only where each negative meets each anchor are there more.
    is_grid = lambda_0.ndim > 2
    return (factored if is_grid else literal)(networks, z, roles, lambda_0, generated)


def literal(
    networks: Networks,
    z: Float[Tensor, "b d"],
    roles: Callable[[Tensor], Roles],
    lambda_0: Float[Tensor, "*b 1"],
    generated: Generated,
) -> Synthetic:
    """Every synthetic feature laid out: what few rows cost least by, and what `factored` has to come to."""
    real = roles(z)
    hat = real._replace(negative=harden(real, lambda_0))
    parts = [getattr(hat, role) for role in generated]
    rows = [z, *(part.flatten(0, -2) for part in parts)]
    y_prime, *y_tilde = networks.generator(torch.cat(rows)).split([len(part) for part in rows])
    z_tilde = networks.embedder(torch.cat(y_tilde)).split([len(part) for part in y_tilde])

    def by_role(of_parts: Sequence[Tensor]) -> dict[str, Tensor]:
        shaped = (rows.view(*part.shape[:-1], -1) for rows, part in zip(of_parts, parts, strict=True))
        return dict(zip(generated, shaped, strict=True))

    return Synthetic(y_prime, by_role(z_tilde), by_role([networks.head(part) for part in y_tilde]))


def factored(
    networks: Networks,
    z: Float[Tensor, "b d"],
    roles: Callable[[Tensor], Roles],
    lambda_0: Float[Tensor, "n m 1"],
    generated: Generated,
) -> Synthetic:
    """The same from the hidden activations on, the negatives among z_tilde as a `LinearImage`."""
    first, relu, norm, last = networks.generator.children()
    *norms_of_y, fc = list(networks.embedder.children()) or [networks.embedder]
    with networks.precision():
        before = first(z).to(z.dtype)

    real, h_of_z = roles(before), relu(before)
    blocks = {role: relu(getattr(real, role)) for role in generated if role != "negative"}
    hidden = {role: _Hidden(rows, moments_of(rows, bool(norms_of_y))) for role, rows in blocks.items()}
    hidden["negative"] = _pulled(real.anchor, real.negative, lambda_0, bool(norms_of_y))

    normalised = _normalisation(
        norm, pooled([moments_of(h_of_z, False), *(block.moments for block in hidden.values())])
    )
    to_y, to_z, to_logits = map(_affine, (last, fc, networks.head))
    for norm_of_y in norms_of_y:
        of_y = pooled([block.moments for block in hidden.values()]).under(to_y.after_scaling(*normalised))
        to_z = to_z.after_scaling(*_normalisation(norm_of_y, of_y))
    z_tilde: dict[str, Tensor | LinearImage]
    z_tilde = {"negative": LinearImage(*hidden["negative"], normalised, (to_y, to_z))}
    to_logits = to_logits.after(to_y).after_scaling(*normalised)
    to_y = to_y.after_scaling(*normalised)
    with networks.precision():
        z_tilde |= {role: F.linear(F.linear(rows, *to_y), *to_z).to(z.dtype) for role, rows in blocks.items()}
        logits = {role: F.linear(block.rows, *to_logits).to(z.dtype) for role, block in hidden.items()}
        return Synthetic(F.linear(h_of_z, *to_y).to(z.dtype), z_tilde, logits)


class _Hidden(NamedTuple):
    """Hidden activations of the generator."""

    rows: Float[Tensor, "*b h"]
    moments: Moments


def _pulled(
    anchor: Float[Tensor, "n 1 h"], negative: Float[Tensor, "1 m h"], lambda_0: Float[Tensor, "n m 1"], covariance: bool
) -> _Hidden:
    """The ReLU of negatives pulled towards anchors, before which all is linear, and the moments of what it gives."""
    rows, *found = _PulledActivations.apply(anchor, negative, lambda_0, covariance)
    return _Hidden(rows, Moments(lambda_0.numel(), *found))


TILE = 2**18
"""Activations that are worked on at once, 1 MiB in float32, so that what is made of them on the way stays in cache."""


class _PulledActivations(torch.autograd.Function):
    """relu(anchor + lambda_0 (negative - anchor)) and its moments, and nothing else of that size made or kept.

    With g the gradient before the ReLU: sum over m of (1 - lambda_0) g for the anchors, sum over n of lambda_0 g for
    the negatives, g . (negative - anchor) for lambda_0. The mean in variance and covariance has no part in g: what it
    weighs sums to zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        anchor: Tensor, negative: Tensor, lambda_0: Tensor, covariance: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows = torch.lerp(anchor, negative, lambda_0).relu_()
        mean = rows.flatten(0, 1).mean(0)
        centred = ((tile - mean).flatten(0, 1) for tile in rows.chunk(_tiles(rows)))
        if not covariance:
            squares = torch.stack([tile.square().sum(0) for tile in centred]).sum(0)
            return rows, mean, squares / lambda_0.numel(), None
        products = torch.stack([tile.T @ tile for tile in centred]).sum(0) / lambda_0.numel()
        return rows, mean, products.diagonal().clone(), products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *output[:2])
        ctx.set_materialize_grads(False)  # where no image is normalised, nothing comes from the covariance

    @staticmethod
    def backward(
        ctx: Any,
        of_rows: Tensor | None,
        of_mean: Tensor | None,
        of_variance: Tensor | None,
        of_covariance: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        anchor, negative, lambda_0, rows, mean = ctx.saved_tensors
        of_rows = torch.zeros_like(rows) if of_rows is None else of_rows
        of_mean, of_variance = (torch.zeros_like(mean) if of is None else of for of in (of_mean, of_variance))
        slope = 2 / lambda_0.numel() * of_variance
        shift = of_mean / lambda_0.numel() - slope * mean
        if of_covariance is not None:
            both = (of_covariance + of_covariance.mT) / lambda_0.numel()
            shift = shift - mean @ both
        of_anchor, of_negative, of_lambda = [], [], []
        parts = (part.chunk(_tiles(rows)) for part in (rows, of_rows, lambda_0, anchor))
        for tile, of_tile, pull, start in zip(*parts, strict=True):
            g = torch.addcmul(of_tile + shift, tile, slope)
            if of_covariance is not None:
                g = g + tile @ both
            g = torch.ops.aten.threshold_backward(g, tile, 0)
            of_anchor.append(torch.matmul((1 - pull).mT, g))
            of_negative.append((pull * g).sum(0, keepdim=True))
            of_lambda.append((g * (negative - start)).sum(-1, keepdim=True))
        return torch.cat(of_anchor), torch.stack(of_negative).sum(0), torch.cat(of_lambda), None


def _tiles(rows: Tensor) -> int:
    """How many to work in; on a GPU, where starting work costs more than memory is slow, one."""
    return 1 if rows.is_cuda else -(-rows.numel() // TILE)


def _affine(layer: nn.Module) -> Affine:
    assert isinstance(layer, nn.Linear)  # as build_networks makes it
    return Affine(layer.weight, layer.bias)


def _normalisation(norm: nn.Module, rows: Moments) -> tuple[Float[Tensor, " u"], Float[Tensor, " u"]]:
    """Return (scale, shift) with norm(x) = scale x + shift among these rows, and have the layer note their moments."""
    assert isinstance(norm, nn.BatchNorm1d)  # as build_networks makes it
    mean, variance = rows.mean, rows.variance
    _note(norm, mean.detach(), variance.detach() * (rows.count / (rows.count - 1)))
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return scale, norm.bias - scale * mean


def _note(norm: nn.BatchNorm1d, mean: Float[Tensor, " u"], variance: Float[Tensor, " u"]) -> None:
    """Take moments, the variance unbiased, into the running ones: those of two rows that have them.

    Set by hand they would be missed by the backward of an earlier pass, which holds on to them.
    """
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    half = (variance / 2).sqrt()
    two = torch.stack([mean - half, mean + half])
    F.batch_norm(two, norm.running_mean, norm.running_var, training=True, momentum=norm.momentum)
