"""What hardness-aware synthesis costs: a step of it beside the formulas written out, the floor, and the plain loss.

A step is that of the loop: draw a batch, every J, every gradient, every optimiser.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from hdml_core import training
from hdml_core.config import Setting, recipe_config
from hdml_core.datasets import LabelledSet
from hdml_core.synthesis import literal
from tests.benchmarks import Row, compare, raised_by
from tests.benchmarks.gpu import made_up

RECIPES = ("paper", "authors")
PAIRS = (64, 16)
"""N-pair's N, in full and quick; with features of 1024, embeddings and hidden units of 512, 100 classes."""


def run(quick: bool) -> list[Row]:
    """Time the step at the authors' size in both recipes, on cached features beside plain losses, in fine-tuning."""
    return [*_authors_size(quick), *_over_plain(quick), _fine_tuning(quick)]


def _authors_size(quick: bool) -> Iterator[Row]:
    n, repeats = (PAIRS[1], 1) if quick else (PAIRS[0], 7)
    a, b = torch.randn(n * n, 512), torch.randn(512, 512)
    for recipe in RECIPES:
        what = f"HDML(npair) step, N = {n}, {recipe} recipe"
        ours, theirs = _step_of(recipe, n), _step_of(recipe, n)
        with FlopCounterMode(display=False) as counter:
            ours()
        products = counter.get_total_flops() / (2 * n * n * 512 * 512)

        def written_out(step: Callable[[], object] = theirs) -> None:
            with mock.patch("hdml_core.methods.hdml.synthesise", literal):
                step()

        yield compare(what, ours, "literal formulas", written_out, repeats, target=0.2)
        row = compare(what, ours, "the products in it alone", lambda: a @ b, repeats, target=1.3)
        yield row._replace(peer=row.peer * products)
        memory = [_memory_of(recipe, whose, n) for whose in ("ours", "literal")]
        yield Row(f"memory of it, {recipe} recipe", memory[0], "literal formulas", memory[1], 1, "MB", target=0.25)


def _step_of(recipe: str, n: int) -> Callable[[], object]:
    return _stepper({"recipe": recipe, **_size(n)}, _made_up(1024))


def _size(n: int) -> dict[str, Setting]:
    return {"network.embedding_size": 512, "data.batch_size": 2 * n}


def _memory_of(recipe: str, whose: str, n: int) -> float:
    """By how many MB a step raises a process's peak."""
    command = [sys.executable, "-m", __name__, recipe, whose, str(n)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _over_plain(quick: bool) -> Iterator[Row]:
    features, repeats = (32, 1) if quick else (1280, 5)
    for recipe in RECIPES:
        for loss, batch in (("npair", 128), ("triplet", 120)):
            settings = {"recipe": recipe, "loss.name": loss, "data.batch_size": batch, "network.embedding_size": 128}
            hdml, plain = (
                _stepper(settings | {"synthesis": synthesis}, _made_up(features)) for synthesis in ("hdml", "none")
            )
            yield compare(f"HDML({loss}) step on cached features, {recipe} recipe", hdml, loss, plain, repeats)


def _fine_tuning(quick: bool) -> Row:
    """The whole network learns: what HDML adds to a step of the authors' extractor at the authors' size of image."""
    side, crop, batch, repeats = (40, 32, 8, 1) if quick else (256, 227, 32, 3)
    train = made_up((3, side, side), classes=50, rows=2, device=torch.device("cpu"))
    settings: dict[str, Setting] = {
        "data.name": "cub200",
        "data.image_size": side,
        "data.crop_size": crop,
        "data.batch_size": batch,
        "network.extractor": "googlenet",
        "network.weights": "",
        "network.embedding_size": 512,
        "optim.channels_last": True,
    }
    hdml, plain = (_stepper(settings | {"synthesis": synthesis}, train) for synthesis in ("hdml", "none"))
    what = f"HDML(npair) fine-tuning step, googlenet, {crop} px, batch {batch}"
    return compare(what, hdml, "npair", plain, repeats, target=1.05)


def _made_up(features: int) -> LabelledSet:
    return made_up((1, features), classes=100, rows=4, device=torch.device("cpu"))


def _stepper(settings: Mapping[str, Setting], train: LabelledSet) -> Callable[[], object]:
    """Return what takes the first step of an epoch again and again."""
    run = _run(settings, train)
    return lambda: training._train_epoch(run, train)


def _run(settings: Mapping[str, Setting], train: LabelledSet) -> training.Run:
    common = {"data.name": "features", "optim.steps_per_epoch": 1, "loss.name": "npair"}
    return training.new_run(recipe_config({**common, **settings}), train)


if __name__ == "__main__":
    recipe, whose, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    train = _made_up(1024)
    run = _run({"recipe": recipe, **_size(n)}, train)
    x, labels = torch.as_tensor(train.values[:, 0]), torch.from_numpy(train.labels)
    with mock.patch("hdml_core.methods.hdml.synthesise", literal) if whose == "literal" else nullcontext():
        training._step(run, x[:4], labels[:4])  # after it the optimisers have what they keep
        print(raised_by(lambda: training._step(run, x[: 2 * n], labels[: 2 * n])))
