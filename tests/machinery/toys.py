"""A study whose trials take no training: `python -m tests.machinery.toys OUT TRIALS SECONDS [PRUNER]` runs it.

A trial climbs to 1 - (x - 0.3)^2 in EPOCHS epochs, keeps its records in its folder as a checkpoint would, and tells
them again when it is resumed. Where x is above `fails_above` it raises.
"""

import json
import sys
import time
from pathlib import Path

from ray import tune

from studies.machinery.driver import Places, execute, start_ray
from studies.machinery.ledger import Ledger, open_storage
from studies.machinery.records import SECONDS, Record
from studies.machinery.search import Series
from studies.machinery.space import Uniform
from studies.machinery.study import Study
from studies.machinery.trial import Job

EPOCHS = 5
GOAL = "validation/recall_at_1"
SPACE = {"x": Uniform(0.0, 1.0)}


class Diverged(FloatingPointError):
    """As NonFiniteLossError is to a training."""


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


def run_toy(out, trials, *, pause=0.0, pruner="none", fails_above=2.0, hours=1.0, parallel=2):
    """Run or resume the toy study; return its ledger."""
    places = Places.under(Path(out))
    ledger = Ledger(open_storage(places.ledger_url), "toy", SPACE, sampler="tpe", pruner=pruner, seed=1)
    ledger.enqueue([{"x": 0.3}])
    recorder = places.recorder("toy")
    ledger.note("mlflow_run", recorder.open("toy", "Why?", {"commit": "none"}, ledger.notes.get("mlflow_run")))

    def job(row):
        settings = {**row.params, "pause": pause, "fails_above": fails_above}
        return Job("search", row.number, settings, Path(), places.out / "toy" / f"{row.number:04d}", 1, 0.0)

    with recorder:
        resources = start_ray(Study("toy", "Why?", {}, parallel=parallel))
        execute([Series("search", ledger, trials, GOAL, job)], recorder, resources, places.out, hours, toy_trial)
    return ledger


if __name__ == "__main__":
    out, trials, pause = sys.argv[1:4]
    run_toy(out, int(trials), pause=float(pause), pruner=sys.argv[4] if len(sys.argv) > 4 else "none")
