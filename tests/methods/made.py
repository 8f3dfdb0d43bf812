"""A batch through networks of a few units each, for the methods' twins."""

import torch
from torch import nn

from hdml_core.config import Config, recipe_config, with_settings
from hdml_core.metric_losses import METRIC_LOSSES
from hdml_core.networks import build_networks
from hdml_core.notation import Batch

CASES = [(recipe, loss) for recipe in ("paper", "authors") for loss in ("npair", "triplet")]


def small_config(recipe: str, loss: str, **settings) -> Config:
    base = recipe_config({"recipe": recipe, "loss.name": loss, "optim.precision": "float64"})
    return with_settings(
        base,
        {
            "network.embedding_size": 4,
            "network.generator_hidden": 6,
            "hdml.alpha": 2.0,
            "hdml.beta": 30.0,
            "loss.l2_reg": 0.02,
            "loss.margin": 3.0,
            "optim.weight_decay": 0.01,
            "data.batch_size": 12,
            **settings,
        },
    )


def small_case(recipe: str, loss: str, **settings):
    """Config, networks in float64, metric loss, and a batch of six pairs or four triplets."""
    config = small_config(recipe, loss, **settings)
    torch.manual_seed(3)
    networks = build_networks(config.network, num_classes=7, feature_size=5, synthesis=config.synthesis).double()
    networks.extractor = nn.Linear(3, 5).double()
    metric_loss = METRIC_LOSSES[loss](config.loss)
    x = torch.randn(12, 3, dtype=torch.float64)
    labels = [0, 1, 2, 3, 4, 5] * 2 if metric_loss.layout == "pairs" else [0, 1, 2, 3] * 2 + [4, 5, 6, 4]
    start = torch.tensor(float("inf"), dtype=torch.float64)
    return config, networks, metric_loss, Batch(x, torch.tensor(labels), start, start)


def assert_same_gradients(own, twin, networks, moved) -> None:
    """The named J's of both records have equal gradients, not all zero, over the parameters of their networks."""
    for name, children in moved.items():
        parameters = [p for child in children for p in getattr(networks, child).parameters()]
        ours = torch.autograd.grad(own[name], parameters, retain_graph=True)
        theirs = torch.autograd.grad(twin[name], parameters, retain_graph=True)
        assert any(gradient.abs().max() > 0 for gradient in ours), name
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
