"""Hardness-aware synthesis: the paper's section 3 on one screen, a batch in, every J out."""

import torch
from torch.nn import functional as F

from hdml_core.augmentor import gap_kept, harden, pull_factors, real_weight
from hdml_core.config import Config
from hdml_core.metric_losses import TupleLoss, mean_where
from hdml_core.networks import Networks, decay_penalty
from hdml_core.notation import Batch, Hardness, HdmlLosses


def hdml_losses(
    networks: Networks, batch: Batch, metric_loss: TupleLoss, config: Config
) -> tuple[HdmlLosses, Hardness]:
    """Return every J of a batch and how hard its synthetic negatives were made."""
    hdml = config.hdml
    y = networks.extractor(batch.x)
    z = networks.embedder(y)
    real = metric_loss.roles(z)
    j_m = metric_loss(real) + decay_penalty(networks, config)

    kept = gap_kept(batch.j_avg, hdml.alpha)
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

    w_real = real_weight(batch.j_gen_avg, hdml.beta)
    j_syn = metric_loss(synthetic)
    j_metric = w_real * j_m + (1 - w_real) * j_syn

    errors = (y_prime - y).square().sum(-1)
    j_recon = errors.mean() if hdml.recon_reduction == "mean" else errors.sum()
    j_soft = torch.zeros_like(j_recon)
    label_roles = metric_loss.roles(batch.labels[:, None])
    for (role, weight), y_role in zip(soft_weights.items(), y_tilde, strict=True):
        of_role = getattr(label_roles, role).expand(*z_hat[role].shape[:-1], 1)
        logits = networks.head(y_role)
        j_soft = j_soft + weight * F.cross_entropy(logits, of_role.flatten())
        if role == "negative":
            is_known = (logits.argmax(-1) == of_role.flatten()).view(of_role.shape[:-1])
    j_gen = hdml.recon_weight * j_recon + hdml.lambda_soft * j_soft

    logits = networks.head(y)
    j_class = F.cross_entropy(logits, batch.labels)

    is_negative, factors = metric_loss.negative_mask(real), lambda_0.detach().squeeze(-1)
    return (
        HdmlLosses(j_m, j_syn, j_metric, j_recon, j_soft, j_gen, j_class),
        Hardness(
            j_avg=batch.j_avg,
            j_gen_avg=batch.j_gen_avg,
            kept=kept,
            w_real=w_real,
            lambda_0_mean=mean_where(is_negative, factors),
            pulled_share=mean_where(is_negative, (factors < 1).to(j_m.dtype)),
            synthetic_accuracy=mean_where(is_negative, is_known.to(j_m.dtype)),
            real_accuracy=(logits.argmax(-1) == batch.labels).to(j_m.dtype).mean(),
        ),
    )
