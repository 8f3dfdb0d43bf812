"""Parts of a step and of what comes before it: the synthetic path, the images, a frozen extractor's features."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from hdml_core import frozen, images, training
from hdml_core.config import recipe_config
from hdml_core.datasets import Dataset
from hdml_core.networks import EXTRACTORS, build_extractor
from hdml_core.synthesis import literal
from tests.benchmarks import Row
from tests.benchmarks.gpu import Given, Say, made_up
from tests.benchmarks.gpu.roofline import seconds
from tests.benchmarks.gpu.timings import TOYS, WORKLOADS


def run(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Time each beside what it is to be measured by."""
    record["rows"] = []
    for part in (_synthesis, _images, _extraction):
        for row in part(given):
            record["rows"].append(row.record())
            say(row)


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
    """Taking and augmenting a batch that lies on the device, as a part of the step that it is for."""
    name, workload = list((TOYS if given.quick else WORKLOADS).items())[-1]
    batch = 12 if given.quick else 128
    train = made_up(workload.shape, classes=12 if given.quick else 100, rows=4, device=given.device)
    settings = {**workload.settings, "data.batch_size": batch, "optim.precision": "bfloat16"}
    run = training.new_run(recipe_config(settings), train, given.device)
    positions = next(run.batches.epoch(0))
    random = torch.Generator().manual_seed(0)
    own = seconds(given.device, lambda: training._inputs(run, train, positions, random))
    step = seconds(given.device, _stepper(run, train))
    return [Row(f"images of a step, {name}, batch {batch}", 1e3 * own, "the step", 1e3 * step, 10, "ms", target=0.05)]


def _extraction(given: Given) -> list[Row]:
    """A cache of MobileNetV2's features, its weights random, beside the forward pass alone."""
    side, crop, classes = (36, 32, 2) if given.quick else (256, 224, 256)
    train = made_up((3, side, side), classes=classes, rows=4, device=torch.device("cpu"))
    dataset = Dataset("made up", "of noise", train, train)
    with tempfile.TemporaryDirectory(prefix="extraction-") as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file(EXTRACTORS["mobilenet_v2"].build().state_dict(), weights)
        settings = {"data.image_size": side, "data.crop_size": crop, "network.extractor": "mobilenet_v2"}
        config = recipe_config(
            {**settings, "data.name": "cub200", "network.weights": str(weights), "network.frozen": "all"}
        )
        bare = build_extractor(config.network).to(given.device).eval()
        values = torch.as_tensor(train.values)
        batches = [images.centre(part.to(given.device), crop) for part in values.split(frozen.EXTRACTED_ROWS)]

        @torch.no_grad()
        def forward() -> None:
            for batch in batches:
                bare(batch)

        def extract() -> None:
            frozen._extract(config, dataset, given.device, Path(folder) / "features.npy")

        own, peer = (seconds(given.device, work, 3) for work in (extract, forward))
    what = f"extraction of {len(train)} images, MobileNetV2 at {crop} px"
    return [Row(what, own, "its bare forward pass", peer, 3, target=1 / 0.95)]


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
