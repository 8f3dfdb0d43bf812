"""What HDML gains where the whole network learns: MobileNetV2 on CUB crops, each loss alone and under HDML.

Both sides have the same rows, epochs, batches and learning rates, and are measured after the last epoch on a validation
fold, whose classes neither has seen. The test classes stay closed. Numbers on crops are not those of whole images.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hdml_core.config import Config, Setting, Settings, recipe_config
from hdml_core.datasets import LabelledSet, load, validation_fold
from hdml_core.datasets.archives import find
from hdml_core.datasets.cub200 import ARCHIVE
from hdml_core.training import fit, new_run
from studies.machinery.intervals import Interval, interval, paired
from tests.benchmarks.gpu import Given, Say, made_up

# alpha and beta as validation chose them on the frozen features of the same images: see studies/LEDGER.md.
LOSSES: Mapping[str, Settings] = {
    "npair": {"hdml.alpha": 25.0, "hdml.beta": 3e4},
    "triplet": {"hdml.alpha": 7e3, "hdml.beta": 53.0},
}
SYNTHESES = ("none", "hdml")
SETTINGS: Settings = {
    "data.name": "cub200",
    "data.image_size": 110,
    "data.crop_size": 96,
    "data.batch_size": 120,
    "network.extractor": "mobilenet_v2",
    "network.batch_norm": "frozen",
    "network.embedding_size": 128,
    "optim.epochs": 8,
    "optim.precision": "bfloat16",
    "optim.channels_last": True,
    "optim.compile": True,
}
TOY: Settings = {
    "data.name": "glyphs",
    "data.image_size": 16,
    "data.crop_size": 14,
    "data.batch_size": 12,
    "network.embedding_size": 16,
    "network.generator_hidden": 16,
    "optim.epochs": 2,
    "optim.steps_per_epoch": 3,
}
QUALITIES = ("recall_at_1", "map_at_r", "nmi")
RATES = (1e-3, 3e-4, 3e-3)
"""Of the embedder; the extractor has a tenth."""
SEEDS, GRID_SEEDS = 8, 3
"""At the first learning rate, and at the others, which come last."""


def run(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Train seed by seed, all arms of a seed or none, until the next would not end in time."""
    if not given.quick and find(given.data, ARCHIVE) is None:
        record["reason"] = f"{ARCHIVE.file} not found in {given.data}: give its folder by --data"
    elif not given.quick and not given.weights.is_file():
        record["reason"] = f"weights not found at {given.weights}: give them by --weights"
    if "reason" in record:
        say(f"left out: {record['reason']}")
        return
    rows = _opened(given)
    chosen = {**(TOY if given.quick else SETTINGS), **given.settings}
    record |= {"settings": chosen, "of_losses": LOSSES, "runs": [], "left_out": [], "summary": []}
    torch.compiler.reset()
    took = 0.0
    for rate, seed in _rounds(given.quick):
        begin = time.monotonic()
        if begin + took > until:
            record["left_out"].append({"rate": rate, "seed": seed})
            continue
        for loss in LOSSES:
            for synthesis in SYNTHESES:
                record["runs"].append(_trained(_config(given, loss, synthesis, rate, seed), rows, given.device))
        took = time.monotonic() - begin
        say(f"learning rate {rate:g}, seed {seed}: {took:.1f} s")
    for rate, loss in dict.fromkeys((run["rate"], run["loss"]) for run in record["runs"]):
        of_loss = [run for run in record["runs"] if (run["rate"], run["loss"]) == (rate, loss)]
        for quality in QUALITIES:
            found = _compared(of_loss, quality)
            record["summary"].append({"rate": rate, "loss": loss, "quality": quality} | _plain(found))
            said = ", ".join(f"{name} {part}" for name, part in found.items())
            say(f"{loss:8} {quality:12} rate {rate:g}: {said} ({found['difference'].n} seeds)")
    if record["left_out"]:
        say(f"left out for want of time: {len(record['left_out'])} seeds")


def _rounds(quick: bool) -> Iterator[tuple[float, int]]:
    first, *others = RATES
    yield from ((first, seed) for seed in range(GRID_SEEDS if quick else SEEDS))
    if not quick:
        yield from ((rate, seed) for seed in range(GRID_SEEDS) for rate in others)


def _config(given: Given, loss: str, synthesis: str, rate: float, seed: int) -> Config:
    settings: dict[str, Setting] = {
        **(TOY if given.quick else {**SETTINGS, "network.weights": str(given.weights)}),
        **LOSSES[loss],
        **given.settings,
        "loss.name": loss,
        "synthesis": synthesis,
        "optim.lr_embedder": rate,
        "optim.lr_extractor": rate / 10,
        "seed": seed,
    }
    return recipe_config(settings)


def _opened(given: Given) -> LabelledSet:
    """Open the training classes, with all their images on the device."""
    if given.quick:
        return made_up((1, 16, 16), classes=20, rows=6, device=given.device)
    return load(_config(given, "npair", "none", RATES[0], 0).data, given.data).train.on(given.device)


def _trained(config: Config, rows: LabelledSet, device: torch.device) -> dict[str, Any]:
    """Train one run, and return what it came to, in plain types."""
    train, validation = validation_fold(rows, config.data.folds, config.data.fold)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    run = new_run(config, train, device)
    fit(run, train, validation, lambda report: None)
    seconds = time.monotonic() - begin
    last = run.reports[-1].validation
    assert last is not None  # a fold is held out
    first_k = config.retrieval.ks[0]
    found = {
        "loss": config.loss.name,
        "synthesis": config.synthesis,
        "rate": config.optim.lr_embedder,
        "seed": config.seed,
        "recall_at_1": last.recall_at[first_k],
        "map_at_r": last.map_at_r,
        "nmi": last.nmi,
        "recall_by_epoch": [report.validation.recall_at[first_k] for report in run.reports if report.validation],
        "losses": dict(run.reports[-1].losses),
        "hardness": dict(run.reports[-1].hardness),
        "seconds": seconds,
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
    }
    del run
    gc.collect()
    return found


def _compared(runs: list[dict[str, Any]], quality: str) -> dict[str, Interval]:
    """The intervals of both sides and of what lies between them, paired by seed."""
    plain, hdml = ({run["seed"]: run[quality] for run in runs if run["synthesis"] == which} for which in SYNTHESES)
    difference = paired(hdml, plain)
    assert difference is not None  # all arms of a seed are trained, or none
    return {"plain": interval(list(plain.values())), "hdml": interval(list(hdml.values())), "difference": difference}


def _plain(found: dict[str, Interval]) -> dict[str, Any]:
    return {name: part._asdict() for name, part in found.items()}
