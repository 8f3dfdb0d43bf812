"""A study of toys: `python -m tests.machinery.toy_study OUT TRIALS SECONDS` runs it, or what is left of it."""

import sys
from pathlib import Path

from studies.machinery.driver import Places, execute, start_ray
from studies.machinery.ledger import Ledger, open_storage
from studies.machinery.search import Series
from studies.machinery.space import Uniform
from studies.machinery.study import Study
from tests.machinery.toys import GOAL, ToyJob, toy_trial


def run_toy(out, trials, *, pause=0.0, pruner="none", fails_above=2.0, hours=1.0, parallel=2):
    """Run or resume the toy study; return its ledger."""
    places = Places.under(Path(out))
    space = {"x": Uniform(0.0, 1.0)}
    ledger = Ledger(open_storage(places.ledger_url), "toy", space, sampler="tpe", pruner=pruner, seed=1)
    ledger.enqueue([{"x": 0.3}])
    recorder = places.recorder("toy")
    ledger.note("mlflow_run", recorder.open("toy", "Why?", {"commit": "none"}, ledger.notes.get("mlflow_run")))

    def job(row):
        settings = {**row.params, "pause": pause, "fails_above": fails_above}
        return ToyJob("search", row.number, settings, places.out / "toy" / f"{row.number:04d}")

    with recorder:
        resources = start_ray(Study("toy", "Why?", {}, parallel=parallel))
        execute([Series("search", ledger, trials, GOAL, job)], recorder, resources, places.out, hours, toy_trial)
    return ledger


if __name__ == "__main__":
    out, trials, pause = sys.argv[1:]
    run_toy(out, int(trials), pause=float(pause))
