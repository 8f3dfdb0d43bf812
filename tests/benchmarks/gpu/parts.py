"""What a step is made of and what comes before it: synthesis, images, frozen features; and many runs at once."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from hdml_core import frozen, fused, images, training
from hdml_core.config import Setting, recipe_config
from hdml_core.datasets import Dataset, LabelledSet
from hdml_core.networks import EXTRACTORS, build_extractor
from hdml_core.synthesis import literal
from tests.benchmarks import Row
from tests.benchmarks.gpu import Given, Say, made_up
from tests.benchmarks.gpu.roofline import seconds
from tests.benchmarks.gpu.timings import TOYS, WORKLOADS


def run(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Time each beside what it is to be measured by; name those that were left out for want of time."""
    record |= {"rows": [], "left_out": []}
    for part in (_synthesis, _images, _extraction, _many_runs):
        if time.monotonic() > until:
            record["left_out"].append(part.__name__.strip("_"))
            continue
        for row in part(given):
            record["rows"].append(row.record())
            say(row)
    if record["left_out"]:
        say(f"left out for want of time: {len(record['left_out'])} parts")


def _synthesis(given: Given) -> list[Row]:
    """A step at the authors' size beside the formulas written out: time, and peak memory."""
    n = 8 if given.quick else 64
    train = made_up((1, 1024), classes=2 * n, rows=4, device=given.device)
    rows = []
    for recipe in ("paper", "authors"):
        settings = {"recipe": recipe, "loss.name": "npair", "data.name": "features", "network.embedding_size": 512}
        config = recipe_config({**settings, "data.batch_size": 2 * n})
        step = _stepper(training.new_run(config, train, given.device), train)
        own, memory = _measured(given, step)
        with mock.patch("hdml_core.methods.hdml.synthesise", literal):
            peer, of_peer = _measured(given, step)
        what = f"HDML(npair) step, N = {n}, {recipe} recipe"
        rows.append(Row(what, 1e3 * own, "literal formulas", 1e3 * peer, 10, "ms", target=0.2))
        if of_peer:
            rows.append(Row(f"memory of it, {recipe} recipe", memory, "literal formulas", of_peer, 1, "MB", 0.25))
    return rows


def _images(given: Given) -> list[Row]:
    """Taking and augmenting a batch that lies on the device, as a part of its step; and the step where it does not."""
    name, workload = list((TOYS if given.quick else WORKLOADS).items())[-1]
    batch, classes, steps = (12, 12, 2) if given.quick else (128, 100, 10)
    on_host = made_up(workload.shape, classes, rows=4, device=torch.device("cpu"))
    on_host = replace(on_host, values=np.asarray(on_host.values))
    on_device = on_host.on(given.device)
    settings = {**workload.settings, "data.batch_size": batch, "optim.precision": "bfloat16"}
    run = training.new_run(recipe_config(settings), on_device, given.device)
    positions = next(run.batches.epoch(0))
    random = torch.Generator().manual_seed(0)
    own = seconds(given.device, lambda: training._inputs(run, on_device, positions, random))

    def step(rows: LabelledSet) -> float:
        """Of several before the device is waited for: what the host does meanwhile costs nothing."""
        step = _stepper(run, rows)
        return seconds(given.device, lambda: [step() for _ in range(steps)]) / steps

    taken, taken_from_host = step(on_device), step(on_host)
    what = f"{name}, batch {batch}"
    return [
        Row(f"images of a step, {what}", 1e3 * own, "the step", 1e3 * taken, 10, "ms", target=0.05),
        Row(f"step from a memory map, {what}", 1e3 * taken_from_host, "resident", 1e3 * taken, 10, "ms", target=1.05),
    ]


def _extraction(given: Given) -> list[Row]:
    """A cache of features beside the forward pass alone, of one MobileNetV2 with random weights."""
    side, crop, batches = (36, 32, 2) if given.quick else (256, 224, 128)
    few = made_up((3, side, side), classes=16, rows=4, device=torch.device("cpu"))
    train = replace(few, values=np.tile(np.asarray(few.values), (batches, 1, 1, 1)))
    dataset = Dataset("made up", "of noise", train, train)
    with tempfile.TemporaryDirectory(prefix="extraction-") as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file(EXTRACTORS["mobilenet_v2"].build().state_dict(), weights)
        settings = {"data.image_size": side, "data.crop_size": crop, "network.extractor": "mobilenet_v2"}
        config = recipe_config(
            {**settings, "data.name": "cub200", "network.weights": str(weights), "network.frozen": "all"}
        )
        bare = build_extractor(config.network).to(given.device).eval()
        batch = images.centre(torch.as_tensor(few.values).to(given.device), crop)

        @torch.no_grad()
        def forward() -> None:
            for _ in range(batches):
                bare(batch)

        def extract() -> None:
            with mock.patch.object(frozen, "build_extractor", return_value=bare):
                frozen._extract(config, dataset, given.device, Path(folder) / "features.npy")

        own, peer = (seconds(given.device, work, 3) for work in (extract, forward))
    what = f"extraction of {len(train.values):,} images, MobileNetV2 at {crop} px"
    return [Row(what, own, "its bare forward pass", peer, 3, target=1 / 0.95)]


def _many_runs(given: Given) -> list[Row]:
    """Epochs of runs on frozen features as one model, beside one run after another."""
    count, features, batch, steps = (3, 32, 12, 1) if given.quick else (32, 1280, 128, 10)
    train = made_up((1, features), classes=100, rows=4, device=given.device)
    rows = []
    for synthesis in ("none", "hdml"):
        settings: dict[str, Setting] = {
            "data.name": "features",
            "data.batch_size": batch,
            "loss.name": "npair",
            "network.embedding_size": 128,
            "optim.steps_per_epoch": steps,
            "synthesis": synthesis,
        }
        at_once, one_by_one = (
            [training.new_run(recipe_config(settings | {"seed": seed}), train, given.device) for seed in range(count)]
            for _ in range(2)
        )
        own = seconds(given.device, lambda runs=at_once: fused._stacked(runs, [train] * count, [None] * count), 3)
        peer = seconds(given.device, lambda runs=one_by_one: [training.take_epoch(run, train, None) for run in runs], 3)
        what = f"epoch of {count} runs as one, {'HDML(npair)' if synthesis == 'hdml' else 'npair'}"
        rows.append(Row(what, own, "one after another", peer, 3, target=0.1))
    return rows


def _stepper(run: training.Run, train: Any) -> Callable[[], object]:
    """Take the first step of an epoch again and again."""
    positions = next(run.batches.epoch(0))
    labels = torch.from_numpy(train.labels[positions]).to(run.device)
    random = torch.Generator().manual_seed(0)
    return lambda: training._step(run, training._inputs(run, train, positions, random), labels)


def _measured(given: Given, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and on a GPU by how many MB the work raises what is allocated; elsewhere 0."""
    taken = seconds(given.device, work)
    if given.device.type != "cuda":
        return taken, 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return taken, (torch.cuda.max_memory_allocated() - before) / 2**20
