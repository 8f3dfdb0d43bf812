"""No synthesis: the metric loss of the real tuples alone."""

from hdml_core.config import Config
from hdml_core.metric_losses import MetricLoss
from hdml_core.networks import Networks, decay_penalty
from hdml_core.notation import Batch, PlainLosses


def plain_losses(networks: Networks, batch: Batch, metric_loss: MetricLoss, config: Config) -> tuple[PlainLosses, None]:
    """Return J_m of a batch, which is J_metric."""
    z = networks.embedder(networks.extractor(batch.x))
    j_m = metric_loss.of_rows(z, batch.labels) + decay_penalty(networks, config)
    return PlainLosses(j_m=j_m, j_metric=j_m), None
