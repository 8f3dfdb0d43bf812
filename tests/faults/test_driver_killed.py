"""A driver that is killed without a word, at every seam of its work, and at random."""

import os
import random
import shutil
import signal
import time

import psutil
import pytest

from tests.faults import ALL, chosen
from tests.faults.drivers import LAST_SEAMS, SEAMS, Fault
from tests.faults.invariants import points, settled

pytestmark = pytest.mark.cluster
KILLS = 200 if ALL else 10


def test_killed_at_every_seam_one_after_another(drivers, undisturbed):
    study = drivers()
    for seam in range(len(SEAMS)):
        assert study.run(Fault(seam)) == -signal.SIGKILL, f"{SEAMS[seam]}: {study.said()}"
    assert study.run() == 0, study.said()
    settled(study, undisturbed)


@pytest.mark.parametrize("seam", chosen(range(len(SEAMS)), []), ids=lambda seam: str(SEAMS[seam]))
def test_killed_at_a_seam(drivers, undisturbed, seam):
    study = drivers()
    in_the_middle = 1 if SEAMS[seam] in LAST_SEAMS else 3
    assert study.run(Fault(seam, in_the_middle)) == -signal.SIGKILL, study.said()
    assert study.run() == 0, study.said()
    settled(study, undisturbed)


def test_killed_at_random(drivers, tmp_path):
    """Two trials at once, which a random search draws alike however often it is interrupted."""
    how = {"trials": 40 if ALL else 8, "sampler": "random", "parallel": 2, "pause": 0.05}
    quiet = drivers(tmp_path / "undisturbed", **how)
    assert quiet.run() == 0, quiet.said()
    settled(quiet)

    study, moments, kills = drivers(tmp_path / "killed", **how), random.Random(0), 0
    while kills < KILLS:
        process = study.start()
        time.sleep(moments.uniform(0.1, 2.5))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was done: the next study begins
            settled(study, points(quiet))
            shutil.rmtree(study.out)
            study = drivers(study.out, **how)
    assert study.run() == 0, study.said()
    settled(study, points(quiet))


@pytest.mark.parametrize("signum", chosen([signal.SIGINT, signal.SIGTERM], [signal.SIGINT]))
def test_asked_to_stop_it_saves_and_goes_on(drivers, undisturbed, signum):
    study = drivers(pause=0.1)
    process = study.start()
    while not list((study.out / "toy").glob("0002/kept/epochs.json")):
        time.sleep(0.05)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 130, study.said()
    assert study.run(pause=0.0) == 0, study.said()
    settled(study, undisturbed)


def test_a_driver_that_is_killed_takes_its_own_ray_along(drivers, undisturbed):
    study = drivers(pause=0.1)
    del study.environment["RAY_ADDRESS"]
    process = study.start()
    while not list((study.out / "toy").glob("0001/kept/epochs.json")):
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in member.name() for member in family)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(family, timeout=90)
    assert not alive
    assert study.run(pause=0.0) == 0, study.said()
    settled(study, undisturbed)


def test_asked_twice_to_stop_it_does_not_wait(drivers, undisturbed):
    study = drivers(pause=0.1)
    process = study.start(hangs=2)
    while not (study.out / "toy/0002/hangs").exists():
        time.sleep(0.05)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.join(20)
    assert process.exitcode == 130, study.said()
    assert study.run(pause=0.0) == 0, study.said()
    settled(study, undisturbed)
