"""The legend: every symbol, axis letter and record of the project.

Reference: Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019; equation numbers are that paper's.

Symbols
    x        image
    y        feature, y = f(x); f is the extractor
    z        embedding, z = g(y); g is the embedder
    z_hat    embedding of a negative after it was pulled towards its anchor
    y_prime  reconstruction of an unaltered sample, i(z); i is the generator
    y_tilde  synthetic feature, i(z_hat)
    z_tilde  synthetic embedding, g(y_tilde)
    d_plus   Euclidean distance of anchor and positive, d(z, z+)
    d_minus  Euclidean distance of anchor and negative, d(z, z-)
    kept     share of the gap d_minus - d_plus that pulling keeps, exp(-alpha / J_avg); the paper's lambda, Eq. (7)
    lambda_0 factor of the interpolation, z + lambda_0 (z- - z)
    w_real   weight of the real tuples in J_metric, exp(-beta / J_gen), Eq. (11)
    j_m      metric loss of the real tuples, Eq. (12) and (13)
    j_syn    the same loss of the synthetic tuples
    j_metric w_real j_m + (1 - w_real) j_syn, Eq. (11); moves f and g
    j_recon  squared error of the reconstructions
    j_soft   cross-entropy of the head on synthetic features
    j_gen    recon_weight j_recon + lambda_soft j_soft, Eq. (9); moves i
    j_class  cross-entropy of the head on real features; moves the head
    j_avg    running average of the metric loss, Eq. (7)
    j_gen_avg  running average of j_gen, the J_gen of Eq. (11)

Symbols of DAML (Duan, Zheng, Lin, Lu, Zhou, "Deep Adversarial Metric Learning", CVPR 2018), where they differ
    y_tilde  synthetic feature of a negative, G(y-, y, y+); G is that method's generator
    j_metric j_syn; moves f and g
    j_hard   squared distance of y_tilde from the anchor's feature
    j_reg    squared distance of y_tilde from the feature of the negative that it is made of
    j_adv    how well the metric still tells z_tilde from its anchor, max(0, d(z_tilde, z)^2 - d_plus^2 - margin)
    j_gen    j_hard + lambda_reg j_reg + lambda_adv j_adv; moves G

Axis letters
    b  rows of a batch       n  tuples of a batch      f  feature size       d  embedding size
    c  channels              h, w  height and width    m  rows of a set      k  classes
    *b is any number of leading axes: a tuple's roles broadcast against each other.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Layout = Literal["pairs", "triplets"]
"""How the rows of a batch are laid out by role: n rows of n classes and n partners in the same order, or n anchors,
n positives of the same classes and n negatives of n other classes."""


class Roles(NamedTuple):
    """The three parts that a row can play in a tuple; shapes broadcast against each other and are never tiled."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


class Batch(NamedTuple):
    """What one step trains on, and where the running averages stand."""

    x: Tensor
    """Images (b, c, h, w), or features (b, f) where f is the identity, laid out as the metric loss wants them."""
    labels: Tensor
    j_avg: Tensor
    j_gen_avg: Tensor


class PlainLosses(NamedTuple):
    """Every J of a step without synthesis, each a scalar on its device."""

    j_m: Tensor
    j_metric: Tensor


class HdmlLosses(NamedTuple):
    """Every J of a step of HDML, each a scalar on its device."""

    j_m: Tensor
    j_syn: Tensor
    j_metric: Tensor
    j_recon: Tensor
    j_soft: Tensor
    j_gen: Tensor
    j_class: Tensor


class DamlLosses(NamedTuple):
    """Every J of a step of DAML, each a scalar on its device."""

    j_m: Tensor
    j_syn: Tensor
    j_metric: Tensor
    j_hard: Tensor
    j_reg: Tensor
    j_adv: Tensor
    j_gen: Tensor


Losses = PlainLosses | HdmlLosses | DamlLosses


class Hardness(NamedTuple):
    """How hard one step's synthetic negatives were made, and how well the head knows them; scalars on the device."""

    j_avg: Tensor
    j_gen_avg: Tensor
    kept: Tensor
    w_real: Tensor
    lambda_0_mean: Tensor
    pulled_share: Tensor
    synthetic_accuracy: Tensor
    """Share of the synthetic negatives to which the head gives the label of the sample that each comes from."""
    real_accuracy: Tensor
    """The same of the real samples."""


class Averages(NamedTuple):
    """The running averages that steer the hardness, and the open window they will next be replaced from."""

    j_avg: Tensor
    j_gen_avg: Tensor
    sum_j_avg: Tensor
    sum_j_gen: Tensor
    steps: int


class RetrievalReport(NamedTuple):
    """Retrieval quality of one set of embeddings; all but the spreads lie in [0, 1]."""

    recall_at: Mapping[int, float]
    map_at_r: float
    r_precision: float
    nmi: float
    nmi_std: float
    f1: float
    f1_std: float


class EpochReport(NamedTuple):
    """What one epoch of training says of itself: means over its steps, the trace of each step, and validation."""

    epoch: int
    step: int
    losses: Mapping[str, float]
    hardness: Mapping[str, float]
    trace: Mapping[str, tuple[float, ...]]
    validation: RetrievalReport | None
    """None where nothing is held out."""
    seconds: float
