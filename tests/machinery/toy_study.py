"""A study of toys: `python -m tests.machinery.toy_study OUT TRIALS [NAME=VALUE ...]` runs it, or what is left of it."""

import json
import sys
from pathlib import Path

from studies.machinery.driver import Places, execute
from studies.machinery.lease import Lease
from studies.machinery.ledger import ATTEMPTS, Ledger
from studies.machinery.resources import start_ray
from studies.machinery.search import Series
from studies.machinery.space import Uniform
from studies.machinery.storage import open_storage
from studies.machinery.store import opened
from studies.machinery.study import Study
from studies.machinery.worker import Job
from tests.machinery.toys import EPOCHS, GOAL, toy_trial

SPACE = {"x": Uniform(0.0, 1.0)}
STUDY = {
    *("sampler", "pruner", "parallel", "hours", "max_attempts", "hang_minutes", "disk_gb", "gpu_hours"),
    *("cpus_per_trial", "gpus_per_trial"),
}
"""Settings that are the study's; all others are the toys'."""


def run_toy(out, trials, *, name="toy", join=False, **settings):
    """Run or resume the toy study; return its ledger."""
    of_study = {key: settings.pop(key) for key in STUDY & settings.keys()}
    study = Study(name, "Why?", {}, trials=trials, **{"pruner": "none", "parallel": 2, **of_study})
    places = Places.under(Path(out))
    storage = open_storage(places.ledger_url)
    folder = places.out / name

    def job(row):
        return Job(
            "search",
            row.number,
            row.notes[ATTEMPTS],
            {**row.params, **settings},
            ({},),
            places.root,
            folder / f"{row.number:04d}",
            resources.cpus,
            resources.gpus,
            60 * study.hang_minutes,
            store=store,
        )

    with Lease(storage.engine, name, join) as lease:
        options = {"sampler": study.sampler, "pruner": study.pruner, "steps": EPOCHS, "seed": 1}
        ledger = Ledger(storage, name, SPACE, lease, **options)
        ledger.enqueue([{"x": 0.3}])
        recorder = places.recorder(name, ledger.identity())
        recorder.open("Why?", {"commit": "none"})
        with recorder:
            resources = start_ray(study)
            with opened(folder) as store:
                series = Series("search", ledger, trials, [GOAL], job, max_attempts=study.max_attempts)
                execute(study, [series], recorder, resources, folder, toy_trial)
    return ledger


if __name__ == "__main__":
    out, trials, *assignments = sys.argv[1:]
    run_toy(out, int(trials), **{name: json.loads(value) for name, _, value in (a.partition("=") for a in assignments)})
