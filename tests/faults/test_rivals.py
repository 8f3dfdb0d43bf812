"""Two drivers at once, a driver that was taken for dead, and clocks that jump."""

import os
import signal
import time

import psutil
import pytest

from studies.machinery.ledger import existing
from tests.faults import chosen
from tests.faults.drivers import SEAMS, Fault
from tests.faults.invariants import opened, settled

pytestmark = pytest.mark.cluster


def begun(study, trials):
    while len(list((study.out / "toy").glob("*/kept/epochs.json"))) < trials:
        time.sleep(0.02)


def test_a_second_driver_is_refused(drivers, undisturbed):
    study = drivers(pause=0.1)
    first = study.start()
    begun(study, 2)
    assert study.run() == 1
    assert f"study 'toy' is at work already: process {first.pid} on " in study.said()
    first.join(120)
    assert first.exitcode == 0, study.said()
    settled(study, undisturbed)


def test_a_second_driver_joins(drivers):
    study = drivers(pause=0.1, sampler="random", parallel=1, trials=10)
    first = study.start()
    begun(study, 1)
    second = study.start(join=True)
    first.join(120)
    second.join(120)
    assert (first.exitcode, second.exitcode) == (0, 0), study.said()
    rows = settled(study)
    assert len({row.notes["owner"] for row in rows}) == 2


def test_of_two_joined_drivers_one_is_killed(drivers):
    study = drivers(pause=0.1, sampler="random", parallel=1, trials=10)
    first = study.start()
    begun(study, 1)
    second = study.start(join=True)
    begun(study, 4)
    first.kill()
    first.join()
    second.join(120)
    assert second.exitcode == 0, study.said()
    assert study.run() == 0, study.said()
    settled(study)


REPORT = next(number for number, seam in enumerate(SEAMS) if str(seam) == "before Ledger.report")


def test_a_driver_that_was_taken_for_dead_writes_nothing_more(drivers, undisturbed):
    study = drivers()
    silent = study.start(Fault(REPORT, nth=12, act="freeze"))
    while psutil.Process(silent.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)
    assert study.run() == 0, study.said()
    with opened(study) as storage:
        rows = existing(storage, "toy").rows()
    os.kill(silent.pid, signal.SIGCONT)
    silent.join(60)
    assert silent.exitcode == 1
    assert "LeaseLostError: another driver took this one for dead" in study.said()
    # It may have been stopped with the tracker's database in its hands: what could not be sent goes now.
    assert study.run() == 0, study.said()
    assert settled(study, undisturbed) == rows


@pytest.mark.parametrize("hours", chosen([-24, 24], [-24]))
def test_the_clock_jumps(drivers, undisturbed, hours):
    study = drivers()
    assert study.run(Fault(REPORT, nth=12, act=f"jump {hours}")) == 0, study.said()
    settled(study, undisturbed)
