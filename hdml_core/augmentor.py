"""The hardness schedule, and the augmentor that pulls each negative towards its anchor as far as it allows.

Section 3.1, Eq. (7):

    lambda_0 = kept + (1 - kept) d_plus / d_minus    where d_minus > d_plus, else 1
    z_hat    = z + lambda_0 (z- - z)

So a pulled negative lies at distance d_plus + kept (d_minus - d_plus) from its anchor: unmoved at kept = 1, as near
as the positive at kept = 0. The reference distance d_plus is d(z, z+) of the same tuple, as in the authors' code.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hdml_core.notation import Roles


def gap_kept(j_avg: Float[Tensor, ""], alpha: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the share of the gap that pulling keeps, exp(-alpha / J_avg), Eq. (7); 1 while J_avg is infinite.

    >>> gap_kept(torch.tensor(40.0), 7.0)  # the authors' triplet sum at the start
    tensor(0.8395)
    """
    return _schedule(j_avg, alpha)


def real_weight(j_gen: Float[Tensor, ""], beta: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the weight of the real tuples, exp(-beta / J_gen), Eq. (11); 1 while J_gen is infinite."""
    return _schedule(j_gen, beta)


def _schedule(average: Float[Tensor, ""], scale: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    # A scale of 0 means "never", also where the average has come down to 0 and the quotient would be NaN.
    if isinstance(scale, Tensor):
        return torch.where(scale > 0, torch.exp(-scale / average), 1.0)
    return torch.exp(-scale / average) if scale > 0 else torch.ones_like(average)


def pull_factors(roles: Roles, kept: Float[Tensor, ""]) -> Float[Tensor, "*b 1"]:
    """Return lambda_0 in [kept, 1] for every tuple.

    The gradient flows through both distances, as in the authors' code. At d_plus = 0 it is the subgradient 0.
    """
    d_plus, d_minus = _distance(roles.anchor, roles.positive), _distance(roles.anchor, roles.negative)
    farther = d_minus > d_plus
    ratio = d_plus / torch.where(farther, d_minus, 1.0)
    return torch.where(farther, kept + (1 - kept) * ratio, 1.0)


def _distance(p: Float[Tensor, "*#b d"], q: Float[Tensor, "*#b d"]) -> Float[Tensor, "*b 1"]:
    if p.ndim == 2:
        return torch.linalg.vector_norm(q - p, dim=-1, keepdim=True)
    # Of n anchors and m others the n x m differences are never laid out; nor is one sum rounded unlike another.
    exact = "donot_use_mm_for_euclid_dist"
    if p.shape[1] == q.shape[0] == 1:
        return torch.cdist(p.squeeze(1), q.squeeze(0), compute_mode=exact).unsqueeze(-1)
    return torch.cdist(p, q, compute_mode=exact)


def harden(roles: Roles, lambda_0: Float[Tensor, "*b 1"]) -> Float[Tensor, "*b d"]:
    """Return z_hat, the negatives after pulling."""
    return roles.anchor + lambda_0 * (roles.negative - roles.anchor)
