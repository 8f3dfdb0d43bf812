"""Deep adversarial metric learning: a generator makes hard negatives that the metric learns to tell apart.

Duan, Zheng, Lin, Lu, Zhou, "Deep Adversarial Metric Learning", CVPR 2018. Symbols are in the legend; [m] marks what is
from memory of the paper.
"""

from hdml_core.config import Config
from hdml_core.metric_losses import TupleLoss, mean_where, squared_distance
from hdml_core.networks import Networks, decay_penalty
from hdml_core.notation import Batch, DamlLosses


def daml_losses(networks: Networks, batch: Batch, metric_loss: TupleLoss, config: Config) -> tuple[DamlLosses, None]:
    """Return every J of a batch, means over the n negatives of its tuples.

    y_tilde  = G(y-, y, y+)
    J_hard   = ||y_tilde - y||^2
    J_reg    = ||y_tilde - y-||^2
    J_adv    = max(0, d(z_tilde, z)^2 - d(z, z+)^2 - margin),   z_tilde = g(y_tilde)
    J_gen    = J_hard + lambda_reg J_reg + lambda_adv J_adv
    J_metric = J(T~), the metric loss with z_tilde in place of the negatives

    The metric sees synthetic negatives alone, as the paper has it [m]: J_m is reported beside them, and moves the
    networks only in the epochs before, `daml.pretrain_share` of all, which are those of the plain method. d is that of
    the embeddings as they are, whether the metric loss normalises them or not.
    """
    daml = config.daml
    y = networks.extractor(batch.x)
    z = networks.embedder(y)
    features, real = metric_loss.roles(y), metric_loss.roles(z)
    decay = decay_penalty(networks, config)

    y_tilde = networks.generator(features.negative, features.anchor, features.positive)
    z_tilde = networks.embedder(y_tilde.flatten(0, -2)).unflatten(0, y_tilde.shape[:-1])
    j_syn = metric_loss(real._replace(negative=z_tilde))

    is_negative = metric_loss.negative_mask(real)
    too_far = squared_distance(z_tilde, real.anchor) - squared_distance(real.anchor, real.positive) - daml.margin
    j_hard = mean_where(is_negative, squared_distance(y_tilde, features.anchor))
    j_reg = mean_where(is_negative, squared_distance(y_tilde, features.negative))
    j_adv = mean_where(is_negative, too_far.relu())

    return DamlLosses(
        j_m=metric_loss(real) + decay,
        j_syn=j_syn,
        j_metric=j_syn + decay,
        j_hard=j_hard,
        j_reg=j_reg,
        j_adv=j_adv,
        j_gen=j_hard + daml.lambda_reg * j_reg + daml.lambda_adv * j_adv,
    ), None
