"""Hardness-aware synthesis: the paper's section 3 on one screen, a batch in, every J out."""

import torch
from torch.nn import functional as F

from hdml_core.augmentor import gap_kept, pull_factors, real_weight
from hdml_core.config import Config
from hdml_core.linear_image import laid_out
from hdml_core.metric_losses import TupleLoss, mean_where
from hdml_core.networks import Networks, decay_penalty
from hdml_core.notation import Batch, Hardness, HdmlLosses
from hdml_core.synthesis import synthesise


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
    soft_weights = metric_loss.soft_weights if hdml.generated_roles == "all" else {"negative": 1.0}
    y_prime, z_tilde, logits = synthesise(networks, z, metric_loss.roles, lambda_0, list(soft_weights))
    if not metric_loss.takes_images:
        z_tilde = {role: laid_out(rows) for role, rows in z_tilde.items()}
    synthetic = real._replace(**z_tilde)  # type: ignore[arg-type]

    w_real = real_weight(batch.j_gen_avg, hdml.beta)
    j_syn = metric_loss(synthetic)
    j_metric = w_real * j_m + (1 - w_real) * j_syn

    errors = (y_prime - y).square().sum(-1)
    j_recon = errors.mean() if hdml.recon_reduction == "mean" else errors.sum()
    j_soft = torch.zeros_like(j_recon)
    label_roles = metric_loss.roles(batch.labels[:, None])
    for role, weight in soft_weights.items():
        of_role = getattr(label_roles, role).squeeze(-1).expand(logits[role].shape[:-1])
        j_soft = j_soft + weight * F.cross_entropy(logits[role].flatten(0, -2), of_role.flatten())
        if role == "negative":
            is_known = logits[role].argmax(-1) == of_role
    j_gen = hdml.recon_weight * j_recon + hdml.lambda_soft * j_soft

    real_logits = networks.head(y)
    j_class = F.cross_entropy(real_logits, batch.labels)

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
            real_accuracy=(real_logits.argmax(-1) == batch.labels).to(j_m.dtype).mean(),
        ),
    )
