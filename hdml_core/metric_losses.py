"""The metric losses J(T): small callables over roles, and how each lays its tuples out.

Every loss says in which `layout` a batch's rows come. A loss of tuples hands out the `roles` of whatever has one entry
per row, never tiled, and is called with roles that hold real or synthetic embeddings alike. With `pairs`, the negatives
of an anchor are rows of the other classes of the batch, laid out along an axis of their own; entries of the anchor's
own class are masked out of every sum. Distances are Euclidean.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hdml_core.config import LossConfig, MetricLossName
from hdml_core.library_losses import PREFIX, build_library_loss
from hdml_core.linear_image import LinearImage
from hdml_core.notation import Layout, Roles


@runtime_checkable
class MetricLoss(Protocol):
    """What the plain objective asks of a metric loss."""

    @property
    def layout(self) -> Layout:
        """How the rows of a batch are laid out by role."""

    def of_rows(self, z: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of a batch of real embeddings."""


@runtime_checkable
class TupleLoss(MetricLoss, Protocol):
    """What synthesis asks of a metric loss besides: its tuples."""

    @property
    def soft_weights(self) -> Mapping[str, float]:
        """How the mean cross-entropies of the roles add up to J_soft where every role is generated."""

    @property
    def takes_images(self) -> bool:
        """Whether negatives may be a `LinearImage`, for no more is asked of them than inner products and norms."""

    def roles(self, rows: Tensor) -> Roles:
        """Something with one entry per row, shape (b, x), as anchor, positive and negative."""

    def negative_mask(self, roles: Roles) -> Bool[Tensor, "*b"]:
        """Which entries of the tuples are negatives indeed."""

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        """The loss of these tuples."""


def squared_distance(p: Float[Tensor, "*#b d"], q: Float[Tensor, "*#b d"]) -> Float[Tensor, "*b"]:
    """Return ||p - q||^2 along the last axis."""
    return (p - q).square().sum(-1)


def mean_where(counts: Bool[Tensor, "*b"], values: Float[Tensor, "*b"]) -> Float[Tensor, ""]:
    """Return the mean of the values that count. To pick them out by the mask, the host would wait for the device."""
    return torch.where(counts, values, 0.0).sum() / counts.sum()


def inner_product(p: Float[Tensor, "n 1 d"], q: Float[Tensor, "#n m d"] | LinearImage) -> Float[Tensor, "n m"]:
    """Return p . q for each of the m rows that q has beside p."""
    return q.inner_product(p) if isinstance(q, LinearImage) else torch.matmul(q, p.mT).squeeze(-1)


class _OfTuples:
    takes_images: ClassVar[bool] = False

    def of_rows(self: TupleLoss, z: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        return self(self.roles(z))


@dataclass(frozen=True)
class TripletLoss(_OfTuples):
    """Sum over triplets of max(0, d(z, z+)^2 - d(z, z-)^2 + m), Eq. (12); unnormalised and a sum as the authors'."""

    margin: float
    layout: ClassVar[Layout] = "triplets"
    soft_weights: ClassVar[Mapping[str, float]] = {"anchor": 1 / 3, "positive": 1 / 3, "negative": 1 / 3}

    def roles(self, rows: Tensor) -> Roles:
        return Roles(*rows.chunk(3))

    def negative_mask(self, roles: Roles) -> Bool[Tensor, " n"]:
        return torch.ones(len(roles.negative), dtype=torch.bool, device=roles.negative.device)

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        gap = squared_distance(roles.anchor, roles.positive) - squared_distance(roles.anchor, roles.negative)
        return F.relu(gap + self.margin).sum()


# The authors add the mean over the n x n negatives and that over the n anchors: their generated positives are the
# diagonal of the negatives, which J_soft has counted by then.
_PAIRS_SOFT_WEIGHTS: Mapping[str, float] = {"anchor": 1.0, "positive": 0.0, "negative": 1.0}


@dataclass(frozen=True)
class _FirstOfPairs(_OfTuples):
    """Tuples of each pair's first row, its second, and the second rows of the other pairs: (n, 1, d) x2, (1, n, d)."""

    layout: ClassVar[Layout] = "pairs"
    soft_weights: ClassVar[Mapping[str, float]] = _PAIRS_SOFT_WEIGHTS
    takes_images: ClassVar[bool] = True

    def roles(self, rows: Tensor) -> Roles:
        first, second = rows.chunk(2)
        return Roles(first[:, None], second[:, None], second[None, :])

    def negative_mask(self, roles: Roles) -> Bool[Tensor, "n n"]:
        return ~torch.eye(len(roles.anchor), dtype=torch.bool, device=roles.anchor.device)


@dataclass(frozen=True)
class NPairLoss(_FirstOfPairs):
    """Mean over i of log(1 + sum_j!=i exp(z_i . z_j+ - z_i . z_i+)), Eq. (13), of inner products without normalisation.

    `l2_reg` adds 0.25 l2_reg (mean |anchor|^2 + mean |positive|^2), Sohn 2016 as the authors weigh it; among
    synthetic tuples their positives are the whole n x n.
    """

    l2_reg: float

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        excess = inner_product(roles.anchor, roles.negative) - inner_product(roles.anchor, roles.positive)
        return _log1p_sum_exp(excess, self.negative_mask(roles)).mean() + _l2(roles, self.l2_reg)


@dataclass(frozen=True)
class AngularLoss(_FirstOfPairs):
    """Mean over i of log(1 + sum_j!=i exp(4 t^2 (z_i + z_i+) . z_j+ - 2 (1 + t^2) z_i . z_i+)), t = tan(angle).

    Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017, Eq. (8), but without normalisation, as in the
    N-pair loss; `l2_reg` is that loss's too.
    """

    angle: float
    l2_reg: float

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        t2 = math.tan(math.radians(self.angle)) ** 2
        to_negative = inner_product(roles.anchor + roles.positive, roles.negative)
        to_positive = inner_product(roles.anchor, roles.positive)
        excess = 4 * t2 * to_negative - 2 * (1 + t2) * to_positive
        return _log1p_sum_exp(excess, self.negative_mask(roles)).mean() + _l2(roles, self.l2_reg)


@dataclass(frozen=True)
class _AllOfPairs(_OfTuples):
    """Tuples of every row, the other row of its pair, and the rows of other pairs: (b, 1, d) x2, (1, b, d)."""

    layout: ClassVar[Layout] = "pairs"
    soft_weights: ClassVar[Mapping[str, float]] = _PAIRS_SOFT_WEIGHTS

    def roles(self, rows: Tensor) -> Roles:
        partners = rows.roll(len(rows) // 2, dims=0)
        return Roles(rows[:, None], partners[:, None], rows[None, :])

    def negative_mask(self, roles: Roles) -> Bool[Tensor, "b b"]:
        b = len(roles.anchor)
        of_class = torch.arange(b, device=roles.anchor.device) % (b // 2)
        return of_class[:, None] != of_class[None, :]


@dataclass(frozen=True)
class ContrastiveLoss(_AllOfPairs):
    """Mean of d(z, z+)^2 over positive pairs, plus the mean of max(0, m - d(z, z-))^2 over the negative pairs.

    Hadsell et al. 2006 without their factor 1/2, on the unit sphere, and with each kind of pair averaged by itself.
    """

    margin: float

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        anchor, positive, negative = (F.normalize(part, dim=-1) for part in roles)
        too_near = F.relu(self.margin - torch.linalg.vector_norm(anchor - negative, dim=-1))
        near = mean_where(self.negative_mask(roles), too_near.square())
        return squared_distance(anchor, positive).mean() + near


@dataclass(frozen=True)
class SemihardTripletLoss(_AllOfPairs):
    """Mean over positive pairs of max(0, d(z, z+)^2 - d(z, z-)^2 + m) with the semi-hard negative of each.

    That is the nearest negative farther than the positive, or, where there is none, the farthest of all.
    Schroff et al., "FaceNet", CVPR 2015, on the unit sphere, with the fall-back of its usual implementations.
    """

    margin: float

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        anchor, positive, negative = (F.normalize(part, dim=-1) for part in roles)
        is_negative = self.negative_mask(roles)
        d2_plus = squared_distance(anchor, positive)
        d2_minus = squared_distance(anchor, negative)
        semihard = torch.where(is_negative & (d2_minus > d2_plus), d2_minus, math.inf).amin(1)
        farthest = torch.where(is_negative, d2_minus, -math.inf).amax(1)
        chosen = torch.where(semihard.isfinite(), semihard, farthest)
        return F.relu(d2_plus.squeeze(1) - chosen + self.margin).mean()


@dataclass(frozen=True)
class LiftedStructureLoss(_AllOfPairs):
    """Half the mean over positive pairs of max(0, J)^2, J = log(sum exp(m - d-) over both rows' negatives) + d+.

    Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, Eq. (4), unnormalised.
    """

    margin: float

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        d_plus = torch.linalg.vector_norm(roles.anchor - roles.positive, dim=-1).squeeze(1)
        d_minus = torch.linalg.vector_norm(roles.anchor - roles.negative, dim=-1)
        repulsion = torch.where(self.negative_mask(roles), self.margin - d_minus, -math.inf).logsumexp(1)
        of_both = torch.logaddexp(repulsion, repulsion.roll(len(repulsion) // 2))
        return F.relu(of_both + d_plus).square().mean() / 2


@dataclass(frozen=True)
class DdmlLoss(_AllOfPairs):
    """Mean of g(1 - tau + d(z, z+)^2) / 2 over positive pairs, plus that of g(1 + tau - d(z, z-)^2) / 2 over negative.

    g(x) = log(1 + exp(b x)) / b. Hu, Lu, Tan, "Discriminative Deep Metric Learning for Face Verification in the Wild",
    CVPR 2014: 1/2 sum of g(1 - l (tau - d^2)), l = 1 for a positive pair and -1 for a negative one, unnormalised; here
    each kind of pair is averaged by itself, as in the contrastive loss. Its norm of the weights is optim.weight_decay.
    """

    threshold: float
    sharpness: float

    def __call__(self, roles: Roles) -> Float[Tensor, ""]:
        too_far = 1 - self.threshold + squared_distance(roles.anchor, roles.positive)
        too_near = 1 + self.threshold - squared_distance(roles.anchor, roles.negative)
        of_positives = self._logistic(too_far).mean()
        return (of_positives + mean_where(self.negative_mask(roles), self._logistic(too_near))) / 2

    def _logistic(self, x: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        # F.softplus leaves off its tail.
        return torch.logaddexp(self.sharpness * x, torch.zeros_like(x)) / self.sharpness


def _log1p_sum_exp(excess: Float[Tensor, "n m"], is_negative: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    masked = torch.where(is_negative, excess, -math.inf)
    return torch.cat([masked, torch.zeros_like(masked[:, :1])], dim=1).logsumexp(1)


def _l2(roles: Roles, l2_reg: float) -> Float[Tensor, ""] | float:
    if l2_reg == 0:
        return 0.0
    return 0.25 * l2_reg * (_mean_square_norm(roles.anchor) + _mean_square_norm(roles.negative))


def _mean_square_norm(rows: Float[Tensor, "*b d"] | LinearImage) -> Float[Tensor, ""]:
    return rows.mean_square_norm() if isinstance(rows, LinearImage) else rows.square().sum(-1).mean()


METRIC_LOSSES: Mapping[MetricLossName, Callable[[LossConfig], TupleLoss]] = {
    "triplet": lambda config: TripletLoss(config.margin),
    "npair": lambda config: NPairLoss(config.l2_reg),
    "contrastive": lambda config: ContrastiveLoss(config.margin),
    "semihard": lambda config: SemihardTripletLoss(config.margin),
    "lifted": lambda config: LiftedStructureLoss(config.margin),
    "angular": lambda config: AngularLoss(config.angle, config.l2_reg),
    "ddml": lambda config: DdmlLoss(config.threshold, config.sharpness),
}


def build_metric_loss(config: LossConfig, num_classes: int, embedding_size: int) -> MetricLoss:
    """Return the loss that `loss.name` says, one of the table or of pytorch-metric-learning."""
    if config.name.startswith(PREFIX):
        return build_library_loss(config.name, config.options, num_classes, embedding_size)
    return METRIC_LOSSES[cast(MetricLossName, config.name)](config)
