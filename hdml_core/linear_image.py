"""Rows that are a linear image of others, left as the product that they are: image = rows weight' + bias.

Where n x m rows of some hundred units pass linear layers, what is asked of their images can often be had from the rows
and the product of the layers, and the images need not be laid out: inner products with them, their squared norms, and
the mean and variance that a batch norm wants.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class Affine(NamedTuple):
    """x -> x weight' + bias: a linear layer, or the product of several."""

    weight: Float[Tensor, "o u"]
    bias: Float[Tensor, " o"]

    def after(self, first: "Affine") -> "Affine":
        """The product of both."""
        return Affine(self.weight @ first.weight, F.linear(first.bias, *self))

    def after_scaling(self, scale: Float[Tensor, " u"], shift: Float[Tensor, " u"]) -> "Affine":
        """The product with x -> scale x + shift, unit by unit."""
        return Affine(self.weight * scale, F.linear(shift, *self))


@dataclass(frozen=True, eq=False)
class Moments:
    """What has to be known of r rows of u units to normalise them, or a linear image of theirs; all biased."""

    count: int
    """r"""
    mean: Float[Tensor, " u"]
    variance: Float[Tensor, " u"]
    covariance: Float[Tensor, "u u"] | None = None
    """Where an image's variance is wanted."""

    def under(self, layer: Affine) -> "Moments":
        """Those of the image under a layer, without its covariance."""
        assert self.covariance is not None  # whoever wants an image's moments has asked for it
        variance = ((layer.weight @ self.covariance) * layer.weight).sum(1)
        return Moments(self.count, F.linear(self.mean, *layer), variance)


def moments_of(rows: Float[Tensor, "*b u"], covariance: bool) -> Moments:
    """Return mean and variance of rows, and where asked for their covariance."""
    flat = rows.flatten(0, -2)
    variance, mean = torch.var_mean(flat, 0, correction=0)
    return Moments(len(flat), mean, variance, torch.cov(flat.T, correction=0) if covariance else None)


def pooled(blocks: Sequence[Moments]) -> Moments:
    """Return the moments of several blocks of rows together: what spreads within them, and how their means do."""
    count = sum(block.count for block in blocks)

    def over_rows(of_blocks: Sequence[Tensor]) -> Tensor:
        shares = (block.count / count for block in blocks)
        return torch.stack([share * value for share, value in zip(shares, of_blocks, strict=True)]).sum(0)

    mean = over_rows([block.mean for block in blocks])
    apart = [block.mean - mean for block in blocks]
    variance = over_rows([block.variance + x.square() for block, x in zip(blocks, apart, strict=True)])
    known = [block.covariance for block in blocks if block.covariance is not None]
    if len(known) < len(blocks):
        return Moments(count, mean, variance)
    return Moments(count, mean, variance, over_rows([c + x[:, None] * x for c, x in zip(known, apart, strict=True)]))


@dataclass(frozen=True, eq=False)
class LinearImage:
    """The image of rows under a scaling and layers one after another, shape (*b, o), not laid out."""

    rows: Float[Tensor, "*b u"]
    moments: Moments
    """Of the rows."""
    scaling: tuple[Float[Tensor, " u"], Float[Tensor, " u"]]
    """(scale, shift) of each unit: x -> scale x + shift."""
    layers: Sequence[Affine]

    @cached_property
    def whole(self) -> Affine:
        """All of it as one layer, which many rows pass at less cost."""
        # The layers are multiplied first: of a product with the scale in it more gradients would be wanted.
        return reduce(lambda first, then: then.after(first), self.layers).after_scaling(*self.scaling)

    def laid_out(self) -> Float[Tensor, "*b o"]:
        """The image's own rows."""
        return F.linear(self.rows, *self.whole)

    def inner_product(self, p: Float[Tensor, "n 1 o"]) -> Float[Tensor, "n m"]:
        """p . row for each of the m rows beside p: the few p pass the layers, from the last to the first."""
        offset = torch.zeros_like(p[..., 0])
        for weight, bias in reversed(self.layers):
            p, offset = p @ weight, offset + p @ bias
        scale, shift = self.scaling
        return torch.matmul(p * scale, self.rows.mT).squeeze(1) + offset + p @ shift

    def mean_square_norm(self) -> Float[Tensor, ""]:
        """The mean of |row|^2."""
        if self.moments.covariance is None:
            return self.laid_out().square().sum(-1).mean()
        image = self.moments.under(self.whole)
        return image.variance.sum() + image.mean.square().sum()


def laid_out(rows: Float[Tensor, "*b o"] | LinearImage) -> Float[Tensor, "*b o"]:
    """The rows, be they laid out already or not."""
    return rows.laid_out() if isinstance(rows, LinearImage) else rows
