"""A suite for one CUDA GPU: are the results right there, what do steps and retrieval cost, what does HDML gain?

`python -m tests.benchmarks.gpu` answers in under ten minutes. It needs the core and what the core needs, and nothing
that drives studies. `--quick` shows on any machine that it runs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hdml_core.config import Setting
from hdml_core.datasets import LabelledSet

Say = Callable[[object], None]


class Given(NamedTuple):
    """What the command was given, as its parts need it."""

    device: torch.device
    quick: bool
    data: Path
    weights: Path
    settings: Mapping[str, Setting]


def made_up(shape: tuple[int, ...], classes: int, rows: int, device: torch.device) -> LabelledSet:
    """Return classes that can be learnt, on the device: images (c, h, w) of a pattern each, or features (v, f)."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), rows)
    values = random.normal(size=(classes, *shape)).astype(np.float32)[labels]
    values += random.standard_normal(values.shape, dtype=np.float32)
    if len(shape) == 3:
        values = np.clip(128 + 40 * values, 0, 255).astype(np.uint8)
    return LabelledSet(values, np.arange(len(labels)), labels, tuple(f"{i:03d}" for i in range(classes))).on(device)


Part = Callable[[Given, float, dict[str, Any], Say], None]
"""A part of the suite: what was given, when it has to stop beginning anything, a record to fill, and how to speak."""
