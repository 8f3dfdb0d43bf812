"""What hardness-aware synthesis costs: a step of HDML on cached features beside a step of its plain metric loss."""

import numpy as np
import torch

from hdml_core import training
from hdml_core.config import recipe_config
from hdml_core.datasets import LabelledSet
from tests.benchmarks import Row, compare


def run(quick: bool) -> list[Row]:
    """Time both losses under both recipes, batch 128 or 120, features of 1280."""
    features, repeats = (32, 1) if quick else (1280, 5)
    labels = np.repeat(np.arange(100), 4)
    values = np.random.default_rng(0).normal(size=(400, 1, features)).astype(np.float32)
    train = LabelledSet(values, np.arange(400), labels, tuple(map(str, range(100))))
    rows = []
    for recipe in ("paper", "authors"):
        for loss, batch in (("npair", 128), ("triplet", 120)):
            settings = {
                "recipe": recipe,
                "loss.name": loss,
                "data.name": "features",
                "data.batch_size": batch,
                "network.embedding_size": 128,
                "optim.steps_per_epoch": 1,
            }
            hdml, plain = (
                training.new_run(recipe_config({**settings, "synthesis": synthesis}), train)
                for synthesis in ("hdml", "none")
            )
            name = f"HDML({loss}), {recipe} recipe"
            rows.append(compare(name, lambda r=hdml: step(r, train), loss, lambda r=plain: step(r, train), repeats))
    return rows


def step(run: training.Run, train: LabelledSet) -> None:
    """Draw a batch and take one step."""
    positions = next(run.batches.epoch(0))
    x = torch.from_numpy(train.values[positions, 0])
    training._step(run, x, torch.from_numpy(train.labels[positions]))
