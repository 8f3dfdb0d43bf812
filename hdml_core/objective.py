"""The paper's section 3 on one screen: a batch in, every J out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hdml_core.augmentor import gap_kept, harden, pull_factors, real_weight
from hdml_core.config import HdmlConfig
from hdml_core.metric_losses import MetricLoss
from hdml_core.networks import Networks
from hdml_core.notation import Hardness, Losses


def plain_losses(networks: Networks, x: Float[Tensor, "b ..."], metric_loss: MetricLoss, weight_decay: float) -> Losses:
    """Return the losses of a run without synthesis: J_metric = J_m, the others zero."""
    z = networks.embedder(networks.extractor(x))
    j_m = metric_loss(metric_loss.roles(z)) + decay_penalty(networks, weight_decay)
    zero = torch.zeros_like(j_m)
    return Losses(j_m=j_m, j_syn=zero, j_metric=j_m, j_recon=zero, j_soft=zero, j_gen=zero, j_class=zero)


def hdml_losses(
    networks: Networks,
    x: Float[Tensor, "b ..."],
    labels: Int[Tensor, " b"],
    metric_loss: MetricLoss,
    hdml: HdmlConfig,
    weight_decay: float,
    j_avg: Float[Tensor, ""],
    j_gen_avg: Float[Tensor, ""],
) -> tuple[Losses, Hardness]:
    """Return every J of a batch and how hard its synthetic negatives were made.

    x are images (b, c, h, w), or features (b, f) where the extractor is the identity, with rows laid out as the
    metric loss wants them. `weight_decay` is added into J_m; pass 0 where the optimiser has it. `j_avg` and
    `j_gen_avg` are the running averages.
    """
    y = networks.extractor(x)
    z = networks.embedder(y)
    real = metric_loss.roles(z)
    j_m = metric_loss(real) + decay_penalty(networks, weight_decay)

    kept = gap_kept(j_avg, hdml.alpha)
    lambda_0 = pull_factors(real, kept)
    hat = real._replace(negative=harden(real, lambda_0))

    # One pass of the generator serves the reconstructions and the synthetic features, as in the authors' code.
    soft_weights = metric_loss.soft_weights if hdml.generated_roles == "all" else {"negative": 1.0}
    z_hat = {role: getattr(hat, role) for role in soft_weights}
    rows = [z, *(part.flatten(0, -2) for part in z_hat.values())]
    sizes = [len(part) for part in rows]
    y_prime, *y_tilde = networks.generator(torch.cat(rows)).split(sizes)
    z_tilde = networks.embedder(torch.cat(y_tilde)).split(sizes[1:])
    synthetic = real._replace(**{role: part.view_as(z_hat[role]) for role, part in zip(z_hat, z_tilde, strict=True)})

    w_real = real_weight(j_gen_avg, hdml.beta)
    j_syn = metric_loss(synthetic)
    j_metric = w_real * j_m + (1 - w_real) * j_syn

    errors = (y_prime - y).square().sum(-1)
    j_recon = errors.mean() if hdml.recon_reduction == "mean" else errors.sum()
    j_soft = torch.zeros_like(j_recon)
    label_roles = metric_loss.roles(labels[:, None])
    for (role, weight), y_role in zip(soft_weights.items(), y_tilde, strict=True):
        of_role = getattr(label_roles, role).expand(*z_hat[role].shape[:-1], 1)
        j_soft = j_soft + weight * F.cross_entropy(networks.head(y_role), of_role.flatten())
    j_gen = hdml.recon_weight * j_recon + hdml.lambda_soft * j_soft

    j_class = F.cross_entropy(networks.head(y), labels)

    of_negatives = lambda_0.detach().squeeze(-1)[metric_loss.negative_mask(real)]
    return (
        Losses(j_m, j_syn, j_metric, j_recon, j_soft, j_gen, j_class),
        Hardness(j_avg, j_gen_avg, kept, w_real, of_negatives.mean(), (of_negatives < 1).to(j_m.dtype).mean()),
    )


def decay_penalty(networks: Networks, weight_decay: float) -> Float[Tensor, ""] | float:
    """Return 0.5 weight_decay times the sum of squares of what decays of f and g."""
    if weight_decay == 0:
        return 0.0
    return 0.5 * weight_decay * torch.stack([p.square().sum() for p in decayed(networks)]).sum()


def decayed(networks: Networks) -> list[nn.Parameter]:
    """Return the trained parameters of f and g that weight decay pulls on: all but those of batch norm."""
    return [
        parameter
        for network in (networks.extractor, networks.embedder)
        for layer in network.modules()
        if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        for parameter in layer.parameters(recurse=False)
        if parameter.requires_grad
    ]
