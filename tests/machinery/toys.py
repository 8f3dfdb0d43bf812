"""Trials without training, for tests of what is around them. Imports little: a worker that runs them starts at once.

A toy climbs to 1 - (x - 0.3)^2 in EPOCHS epochs, keeps in its folder how far it is, as a checkpoint would, and tells
its epochs again when it is resumed. Where x is above `fails_above` it raises.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

from ray import tune

from studies.machinery.records import SECONDS, Record

EPOCHS = 5
GOAL = "validation/recall_at_1"


class Diverged(FloatingPointError):
    """As NonFiniteLossError is to a training."""


class ToyJob(NamedTuple):
    """What a toy has to know."""

    kind: str
    number: int
    settings: dict
    folder: Path


def toy_trial(config):
    job = config["job"]
    x, pause, fails_above = (job.settings[name] for name in ("x", "pause", "fails_above"))
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "epochs.json"
    epochs = json.loads(path.read_text()) if path.exists() else []

    def tell(epoch):
        value = (1 - (x - 0.3) ** 2) * epoch / EPOCHS
        trace = {"hardness/kept": tuple((10 * (epoch - 1) + i + 1, 0.5) for i in range(10))}
        metrics = {SECONDS: 0.1 * epoch, "train/j_m": 1.0 / epoch, GOAL: value}
        record = Record(epoch, 10 * epoch, 0.1 * epoch, metrics, trace, {"device": "cpu"}, last=epoch == EPOCHS)
        tune.report({"record": record})

    for epoch in epochs:
        tell(epoch)
    for epoch in range(len(epochs) + 1, EPOCHS + 1):
        time.sleep(pause)
        if x > fails_above:
            raise Diverged(f"j_m is nan at epoch {epoch}")
        epochs.append(epoch)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(epochs))
        aside.rename(path)
        tell(epoch)
