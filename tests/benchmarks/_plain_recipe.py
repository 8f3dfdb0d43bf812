"""HDML tuned on one folder of images, three ways: `... OUT WAY IMAGES WEIGHTS SIZE`, SIZE as JSON.

`recipe` is what everyone writes today: a function for Ray Tune, OptunaSearch, ASHA and MLflowLoggerCallback; the
formulas as the paper has them; ImageFolder and DataLoader; the frozen extractor run on the images of every batch; one
fold after another; AccuracyCalculator. `cached` is the same loop on features that were extracted once. `study` is a
study here. Nothing is pruned: ASHA's grace lasts for a whole trial. Leaves `scores.json` in OUT.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from studies.machinery.cli import main as run_study
from studies.machinery.records import trial_id
from studies.machinery.space import Choice
from studies.machinery.study import Study

SLOTS, FEATURE = 2, 1280
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Size(NamedTuple):
    """What both train. Every alpha is tried with every beta."""

    alphas: Sequence[float]
    betas: Sequence[float]
    folds: int
    epochs: int
    side: int
    """Of the images, in pixels."""
    batch: int
    embedding: int
    hidden: int

    @property
    def points(self) -> list[tuple[float, float]]:
        """Alpha and beta of every trial."""
        return [*product(self.alphas, self.betas)]


class Scores(NamedTuple):
    """What a way came to."""

    begin: float
    """When its first trial began, and its last one ended, in seconds since 1970."""
    end: float
    folds: list[list[float]]
    """Recall@1 on each fold after its last epoch, of every trial."""


# What everyone writes ---------------------------------------------------------------------------------------------


def load_extractor(weights: str) -> nn.Module:
    """The frozen network up to its pooled features."""
    model = models.mobilenet_v2(weights=None)
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()}, strict=False)
    model.classifier = nn.Identity()
    return model.eval().requires_grad_(False)


def load_images(images: str, side: int) -> ImageFolder:
    """The images, squashed and normalised."""
    steps = [transforms.Resize((side, side)), transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    return ImageFolder(images, transforms.Compose(steps))


class HDML:
    """Embedder, generator and head, with an optimiser for each."""

    def __init__(self, classes: int, size: Size, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.embedder = nn.Linear(FEATURE, size.embedding)
        self.generator = nn.Sequential(
            nn.Linear(size.embedding, size.hidden),
            nn.ReLU(),
            nn.BatchNorm1d(size.hidden),
            nn.Linear(size.hidden, FEATURE),
        )
        self.head = nn.Linear(FEATURE, classes)
        for layer in (self.embedder, self.generator[0], self.generator[3], self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.optimisers = {
            network: torch.optim.Adam(network.parameters(), lr=1e-3)
            for network in (self.embedder, self.generator, self.head)
        }
        self.j_avg = self.j_gen_avg = float("inf")

    def losses(self, y: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """J_m, J_metric, J_gen and J_class of pairs, one after the other in the batch."""
        z = self.embedder(y)
        anchor, positive = z[0::2], z[1::2]
        n, target = len(anchor), torch.arange(len(anchor))
        inner = anchor @ positive.T
        j_m = F.cross_entropy(inner, target)

        kept = torch.exp(torch.tensor(-self.alpha / self.j_avg))
        d_plus = (anchor - positive).norm(dim=1)[:, None]
        d_minus = (anchor[:, None] - positive[None]).norm(dim=2)
        lambda_0 = torch.where(d_minus > d_plus, kept + (1 - kept) * d_plus / d_minus, 1.0)
        z_hat = anchor[:, None] + lambda_0[:, :, None] * (positive[None] - anchor[:, None])
        made = self.generator(torch.cat([z, z_hat.reshape(n * n, -1)]))
        y_prime, y_tilde = made[: 2 * n], made[2 * n :]
        z_tilde = self.embedder(y_tilde).view(n, n, -1)
        inner_syn = (anchor[:, None] * z_tilde).sum(2)
        j_syn = F.cross_entropy(torch.where(torch.eye(n, dtype=torch.bool), inner, inner_syn), target)

        w_real = torch.exp(torch.tensor(-self.beta / self.j_gen_avg))
        j_metric = w_real * j_m + (1 - w_real) * j_syn
        j_recon = (y_prime - y).square().sum(1).mean()
        j_soft = F.cross_entropy(self.head(y_tilde), labels[1::2].repeat(n))
        j_class = F.cross_entropy(self.head(y), labels)
        return j_m, j_metric, j_recon + j_soft, j_class

    def step(self, y: Tensor, labels: Tensor) -> tuple[float, float]:
        """Take a step; return J_m and J_gen."""
        j_m, j_metric, j_gen, j_class = self.losses(y, labels)
        for (network, optimiser), j in zip(self.optimisers.items(), (j_metric, j_gen, j_class), strict=True):
            optimiser.zero_grad()
            j.backward(retain_graph=True, inputs=list(network.parameters()))
        for optimiser in self.optimisers.values():
            optimiser.step()
        return j_m.item(), j_gen.item()


def train(config: dict[str, Any], *, images: str, weights: str, size: Size, features: Tensor | None = None) -> None:
    """One trial, for Ray Tune: each fold of the training classes validates in its turn."""
    folder = load_images(images, size.side)
    labels = torch.tensor(folder.targets)
    data = folder if features is None else TensorDataset(features, labels)
    extractor = load_extractor(weights) if features is None else nn.Identity()
    training_classes = torch.arange((len(folder.classes) + 1) // 2)
    done: list[float] = []
    for fold in range(size.folds):
        validates = training_classes % size.folds == fold
        sides = training_classes[~validates], training_classes[validates]
        rows = [torch.isin(labels, classes).nonzero()[:, 0] for classes in sides]
        new_label = torch.full((len(folder.classes),), -1)
        new_label[sides[0]] = torch.arange(len(sides[0]))

        torch.manual_seed(0)
        model = HDML(len(sides[0]), size, config["alpha"], config["beta"])
        steps = -(-len(rows[0]) // size.batch)
        sampler = MPerClassSampler(labels[rows[0]], 2, size.batch, steps * size.batch)
        batches = DataLoader(Subset(data, rows[0].tolist()), size.batch, sampler=sampler)
        held_out = DataLoader(Subset(data, rows[1].tolist()), size.batch)
        for epoch in range(size.epochs):
            told = []
            for x, of_x in batches:
                with torch.no_grad():
                    y = extractor(x)
                told.append(model.step(y, new_label[of_x]))
            model.j_avg, model.j_gen_avg = (sum(j) / len(j) for j in zip(*told, strict=True))
            found = validate(model, extractor, held_out)
            folds = [*done, found["precision_at_1"]]
            tune.report({"recall_at_1": sum(folds) / len(folds), "folds": folds, "epoch": epoch, **found})
        done = folds


@torch.no_grad()
def validate(model: HDML, extractor: nn.Module, held_out: DataLoader) -> dict[str, float]:
    """Retrieval among the rows of classes that did not train."""
    z, labels = zip(*((model.embedder(extractor(x)), of_x) for x, of_x in held_out), strict=True)
    metrics = ("precision_at_1", "mean_average_precision_at_r", "r_precision", "NMI")
    calculator = AccuracyCalculator(include=metrics, k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(F.normalize(torch.cat(z), dim=1), torch.cat(labels))


def recipe(out: Path, images: str, weights: str, size: Size, cached: bool) -> Scores:
    """Search as everyone does; `cached`: on features that are extracted once."""
    features = None
    if cached:
        extractor = load_extractor(weights)
        with torch.no_grad():
            features = torch.cat([extractor(x) for x, _ in DataLoader(load_images(images, size.side), 64)])
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    trainable = tune.with_parameters(train, images=images, weights=weights, size=size, features=features)
    epochs = size.folds * size.epochs
    points = [{"alpha": alpha, "beta": beta} for alpha, beta in size.points]
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"alpha": tune.loguniform(0.01, 300), "beta": tune.loguniform(0.01, 1e5)},
        tune_config=tune.TuneConfig(
            metric="recall_at_1",
            mode="max",
            search_alg=OptunaSearch(points_to_evaluate=points),
            scheduler=ASHAScheduler(max_t=epochs, grace_period=epochs),
            num_samples=len(points),
            max_concurrent_trials=SLOTS,
        ),
        run_config=tune.RunConfig(
            name="recipe",
            storage_path=str(out),
            verbose=0,
            callbacks=[MLflowLoggerCallback(f"sqlite:///{out}/mlflow.db", experiment_name="recipe")],
        ),
    )
    last = [result.metrics for result in tuner.fit()]
    end = [metrics["timestamp"] for metrics in last]
    begin = [at - metrics["time_total_s"] for at, metrics in zip(end, last, strict=True)]
    return Scores(min(begin), max(end), [metrics["folds"] for metrics in last])


# The same as a study ----------------------------------------------------------------------------------------------


def study(out: Path, images: str, weights: str, size: Size) -> Scores:
    """Run the study from its command line."""
    asked = Study(
        name="alpha_beta",
        question="How does retrieval depend on alpha and beta?",
        base={
            "loss.name": "npair",
            "data.name": "folder",
            "data.path": images,
            "data.image_size": size.side,
            "data.crop_size": size.side,
            "data.batch_size": size.batch,
            "data.folds": size.folds,
            "network.extractor": "mobilenet_v2",
            "network.weights": weights,
            "network.frozen": "all",
            "network.embedding_size": size.embedding,
            "network.generator_hidden": size.hidden,
            "optim.epochs": size.epochs,
            "retrieval.clusterings": 1,
        },
        space={"hdml.alpha": Choice(tuple(size.alphas)), "hdml.beta": Choice(tuple(size.betas))},
        sampler="grid",
        pruner="none",
        folds=size.folds,
        trials=len(size.points),
        parallel=SLOTS,
    )
    if status := run_study(asked, ["--out", str(out)]):
        raise RuntimeError(f"the study must end with exit status 0, got {status}")
    rows = optuna.load_study(study_name=asked.name, storage=f"sqlite:///{out}/ledger.db").trials
    folders = [out / asked.name / "trials" / trial_id(row.number) for row in rows]
    begin, end = min(row.datetime_start for row in rows), max(row.datetime_complete for row in rows)
    return Scores(begin.timestamp(), end.timestamp(), [list(_of_parts(folder)) for folder in folders])


def _of_parts(folder: Path) -> Iterator[float]:
    """Recall@1 at the end of each part of a trial."""
    for part in sorted(folder.glob("part-*")):
        newest = max(part.glob("epoch-*"))
        yield json.loads((newest / "run.json").read_text())["reports"][-1]["validation"]["recall_at"]["1"]


def main(out: Path, way: str, images: str, weights: str, size: Size) -> None:
    """Run the trials in one way, and write down what they came to."""
    found = study(out, images, weights, size) if way == "study" else recipe(out, images, weights, size, way == "cached")
    (out / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # Under its own name, workers import what they run.
    from tests.benchmarks import _plain_recipe

    _plain_recipe.main(Path(sys.argv[1]), *sys.argv[2:5], _plain_recipe.Size(**json.loads(sys.argv[5])))
