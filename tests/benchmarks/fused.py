"""What several runs on cached features take at once, beside the same runs one after another with all cores.

The runs are two seeds on each of five folds: features of 1280, embeddings of 128, 100 classes of 10 rows train and 25
validate. On a CPU the runs go side by side, each on a core; a GPU takes them as one model, and what that would be on
this CPU is a row of its own.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch

from hdml_core import fused, training
from hdml_core.config import Setting, recipe_config
from hdml_core.datasets import LabelledSet, validation_fold
from tests.benchmarks import Row, compare
from tests.benchmarks.gpu import made_up

METHODS = (("none", "npair", 128), ("none", "triplet", 120), ("hdml", "npair", 128), ("hdml", "triplet", 120))
FOLDS, SEEDS = 5, 2
TARGET = 0.5
PEER = "one after another"


def run(quick: bool) -> list[Row]:
    """Time epochs of both methods and losses in both recipes: validated, as a trial has them, and their steps alone."""
    features, repeats = (32, 1) if quick else (1280, 3)
    rows = []
    for recipe, (synthesis, loss, batch) in product(("paper", "authors"), METHODS):
        settings: dict[str, Setting] = {
            "recipe": recipe,
            "data.name": "features",
            "data.batch_size": batch // 8 * 2 if quick else batch,
            "synthesis": synthesis,
            "loss.name": loss,
            "network.embedding_size": 128,
            "optim.steps_per_epoch": 1 if quick else 0,
        }
        ours, theirs = _Runs(settings, features), _Runs(settings, features)
        named = f"HDML({loss})" if synthesis == "hdml" else loss
        what = f"{FOLDS * SEEDS} runs of {named}, {recipe} recipe"
        at_once, as_one = ours.epochs(fused._side_by_side), ours.epochs(fused._stacked)
        rows.append(compare(f"{what}, validated", at_once, PEER, theirs.one_by_one, repeats, target=TARGET))
        if recipe == "paper":
            ours.validations = theirs.validations = [None] * len(ours.runs)
            rows.append(compare(f"{what}, steps alone", at_once, PEER, theirs.one_by_one, 1, target=TARGET))
            rows.append(compare(f"{what}, steps as one model", as_one, PEER, theirs.one_by_one, 1))
    return rows


class _Runs:
    """Two seeds on each fold."""

    def __init__(self, settings: dict[str, Setting], features: int) -> None:
        rows = made_up((1, features), classes=125, rows=10, device=torch.device("cpu"))
        folds = [validation_fold(rows, FOLDS, fold) for fold in range(FOLDS)] * SEEDS
        self.trains = [train for train, _ in folds]
        self.validations: Sequence[LabelledSet | None] = [validation for _, validation in folds]
        self.runs = [
            training.new_run(recipe_config(settings | {"seed": seed}), train) for seed, train in enumerate(self.trains)
        ]

    def epochs(self, take: Callable[..., object]) -> Callable[[], object]:
        return lambda: take(self.runs, self.trains, self.validations)

    def one_by_one(self) -> None:
        for run, train, validation in zip(self.runs, self.trains, self.validations, strict=True):
            training.take_epoch(run, train, validation)
