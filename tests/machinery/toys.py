"""Trials without training, for tests of what is around them. Imports little: a worker that runs them starts at once.

A toy climbs to 1 - (x - 0.3)^2 in EPOCHS epochs, keeps in its folder how far it is, as a checkpoint would, and tells
its epochs again when it is resumed. Its settings can make it fail in every way that a training can.
"""

import json
import os
import time

from studies.machinery.records import GPU_SECONDS, PEAK_MEMORY, SECONDS, TAG_ATTEMPT, TAG_DEVICE, Record
from studies.machinery.store import bring, demand_ownership, keep, leave, take_over
from studies.machinery.worker import in_time

EPOCHS = 5
GOAL = "validation/recall_at_1"
LEAKED = []


class Diverged(FloatingPointError):
    """As NonFiniteLossError is to a training."""


def value(x, epoch=EPOCHS):
    return (1 - (x - 0.3) ** 2) * epoch / EPOCHS


def toy_trial(config):
    job = config["job"]
    x, pause = job.settings["x"], job.settings.get("pause", 0.0)
    job = take_over(job)
    try:
        climb(job, x, pause)
    finally:
        leave(job)


def climb(job, x, pause):
    tell = in_time(job)
    bring(job, job.folder)
    path = job.folder / "kept" / "epochs.json"
    path.parent.mkdir(exist_ok=True)
    epochs = json.loads(path.read_text()) if path.exists() else []
    for epoch, _ in epochs:
        tell(record(job, x, epoch))
    for epoch in range(len(epochs) + 1, EPOCHS + 1):
        time.sleep(pause)
        mischief(job, x, epoch)
        epochs.append((epoch, job.attempt))
        demand_ownership(job)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(epochs))
        once(job, "dies_in_checkpoint", epoch, lambda: os.kill(os.getpid(), 9))
        aside.rename(path)
        keep(job, path.parent)
        once(job, "dies_in_report", epoch, lambda: os.kill(os.getpid(), 9))
        tell(record(job, x, epoch))


def record(job, x, epoch):
    trace = {"hardness/kept": tuple((10 * (epoch - 1) + i + 1, 0.5) for i in range(10))}
    costs = {SECONDS: 0.1 * epoch, GPU_SECONDS: 0.1 * epoch, PEAK_MEMORY: 100.0}
    return Record(
        epoch=epoch,
        step=10 * epoch,
        seconds=0.1 * epoch,
        metrics={"train/j_m": 1.0 / epoch, GOAL: value(x, epoch), **costs},
        part=0,
        part_qualities={GOAL: value(x, epoch)},
        ends_part=epoch == EPOCHS,
        trace=trace,
        tags={TAG_DEVICE: "cpu", TAG_ATTEMPT: str(job.attempt)},
        last=epoch == EPOCHS,
    )


def mischief(job, x, epoch):
    """What goes wrong before an epoch ends."""
    if x > job.settings.get("diverges_above", 2.0):
        raise Diverged(f"j_m is nan at epoch {epoch}")
    LEAKED.append(b"x" * int(2**20 * job.settings.get("leaks_mb", 0)))
    once(job, "dies_in_step", epoch, lambda: os.kill(os.getpid(), 9))
    once(job, "raises", epoch, lambda: fail("the disk is full"))
    once(job, "hangs", epoch, lambda: time.sleep(600))
    if job.settings.get("always_raises") == job.number:
        fail(os.path.expandvars(job.settings.get("says", "it always does")))


def once(job, what, epoch, act):
    """Do it in the third epoch of the trial of the number that the setting names, the first time only."""
    mark = job.folder / what
    if job.settings.get(what) == job.number and epoch == 3 and not mark.exists():
        mark.touch()
        act()


def fail(says):
    raise OSError(says)
