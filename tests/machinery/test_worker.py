"""What keeps a worker honest: the watch it is under, and the memory that it may not keep."""

import gc
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.tune.trainable.function_trainable import FunctionTrainable

from studies.machinery import worker
from studies.machinery.worker import (
    GPU_GROWTH_MB,
    GROWTH_MB,
    FreshProcessError,
    Job,
    Kept,
    as_worker,
)
from tests.conftest import ROOT


def job(folder, attempt=1, hang_seconds=math.inf):
    return Job("search", 7, attempt, {}, ({},), folder, folder / "0007", 1, 0.0, hang_seconds)


HANGS = """
import math, sys, time
from pathlib import Path
from studies.machinery.worker import Job, in_time

def stuck_for_ever():
    while True:
        time.sleep(1)

folder = Path(sys.argv[1])
in_time(Job("search", 7, 1, {}, ({},), folder, folder, 1, 0.0, 1.0))
stuck_for_ever()
"""


def test_a_worker_that_hangs_is_ended_and_leaves_what_it_was_at(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 1
    said = Path(tmp_path / "hung-1.txt").read_text()
    assert "Timeout (0:00:01)!" in said
    assert "in stuck_for_ever" in said


REPORTS = """
import sys, time, types
from pathlib import Path
from studies.machinery import worker

def report(metrics):
    time.sleep(2)  # the driver lets the worker wait

worker.tune = types.SimpleNamespace(report=report)
folder = Path(sys.argv[1])
tell = worker.in_time(worker.Job("search", 7, 1, {}, ({},), folder, folder, 1, 0.0, 1.0))
tell(types.SimpleNamespace(last=False))
tell(types.SimpleNamespace(last=True))
time.sleep(2)  # nothing is left to watch
"""


def test_to_wait_for_the_driver_or_for_the_next_trial_is_not_to_hang(tmp_path):
    done = subprocess.run([sys.executable, "-c", REPORTS, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert Path(tmp_path / "hung-1.txt").read_text() == ""


@pytest.mark.parametrize(
    ("grown", "gpu_grown", "spent"),
    [
        (GROWTH_MB, GPU_GROWTH_MB, False),
        (GROWTH_MB + 1, 0, True),
        (0, GPU_GROWTH_MB + 1, True),
        (-500, 0, False),
    ],
)
def test_a_worker_whose_memory_grew_makes_way_for_a_fresh_process(monkeypatch, grown, gpu_grown, spent):
    held = [(700.0, 10.0), (700.0 + grown, 10.0 + gpu_grown)]
    monkeypatch.setattr(worker, "memory_mb", lambda: held.pop(0))
    monkeypatch.setattr(FunctionTrainable, "setup", lambda self, config: None)
    monkeypatch.setattr(FunctionTrainable, "reset_config", lambda self, new_config: True)
    reused = as_worker(lambda config: None)(config={})
    if spent:
        with pytest.raises(FreshProcessError, match=f"memory grew by {grown} MB, on the GPU {gpu_grown} MB"):
            reused.reset_config({})
    else:
        assert reused.reset_config({})


def test_a_worker_keeps_one_thing_and_knows_its_size(monkeypatch):
    held = [(700.0, 10.0), (750.0, 40.0), (700.0, 10.0), (701.0, 10.0)]
    monkeypatch.setattr(worker, "memory_mb", lambda: held.pop(0))
    kept = Kept()
    assert [kept.take("birds", lambda: "all birds"), kept.take("birds", fail)] == ["all birds"] * 2
    assert kept.mb == (50.0, 30.0)
    assert kept.take("cars", lambda: (kept.mb, "all cars")) == ((0.0, 0.0), "all cars")  # the birds went first
    assert kept.mb == (1.0, 0.0)


def test_what_can_t_be_opened_is_not_kept():
    kept = Kept()
    with pytest.raises(OSError, match="opened again"):
        kept.take("birds", fail)
    assert kept.take("birds", lambda: "all birds") == "all birds"


def fail():
    raise OSError("opened again")


def test_the_data_that_a_worker_keeps_are_no_growth(monkeypatch):
    held = [(700.0, 10.0), (701.0 + GROWTH_MB, 10.0)]
    monkeypatch.setattr(worker, "memory_mb", lambda: held.pop(0))
    monkeypatch.setattr(FunctionTrainable, "setup", lambda self, config: None)
    monkeypatch.setattr(FunctionTrainable, "reset_config", lambda self, new_config: True)
    monkeypatch.setattr(worker.DATA, "mb", (0.0, 0.0))
    sent = cloudpickle.loads(cloudpickle.dumps(as_worker(lambda config: None)))(
        config={}
    )  # as Ray sends it to a worker
    worker.DATA.mb = (1.0, 0.0)
    assert sent.reset_config({})


def test_between_trials_only_what_trials_left_is_looked_through(monkeypatch):
    monkeypatch.setattr(FunctionTrainable, "setup", lambda self, config: None)
    monkeypatch.setattr(FunctionTrainable, "reset_config", lambda self, new_config: True)
    reused = as_worker(lambda config: None)(config={})
    assert gc.get_freeze_count() > len(gc.get_objects())

    class Left:
        def __init__(self):
            self.itself = self

    left = weakref.ref(Left())
    assert reused.reset_config({})
    assert left() is None
    gc.unfreeze()


def test_a_worker_whose_last_trial_does_not_end_makes_way_too(monkeypatch):
    monkeypatch.setattr(FunctionTrainable, "setup", lambda self, config: None)
    monkeypatch.setattr(FunctionTrainable, "reset_config", lambda self, new_config: False)
    with pytest.raises(FreshProcessError, match="does not end"):
        as_worker(lambda config: None)(config={}).reset_config({})
