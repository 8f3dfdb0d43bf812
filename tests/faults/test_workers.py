"""Workers that die, raise, hang or leak, and nodes that go: a trial is tried again, as often as it may be."""

import time
from contextlib import suppress

import pytest

from studies.machinery.ledger import ATTEMPTS, CRASHES, REASON
from tests.faults import chosen
from tests.faults.invariants import points, settled
from tests.services import small_disk

pytestmark = pytest.mark.cluster


DEATHS = [("dies_in_step", "ActorDiedError"), ("dies_in_report", "ActorDiedError")]
OTHERS = [("dies_in_checkpoint", "ActorDiedError"), ("raises", "OSError: the disk is full")]


@pytest.mark.parametrize(("what", "reason"), chosen(DEATHS + OTHERS, OTHERS))
def test_a_trial_whose_worker_goes_is_tried_again(drivers, undisturbed, what, reason):
    study = drivers(**{what: 2})
    assert study.run() == 0, study.said()
    rows = settled(study, undisturbed)
    assert [row.notes[ATTEMPTS] for row in rows] == [1, 1, 2, 1, 1, 1, 1, 1]
    (crash,) = rows[2].notes[CRASHES]
    assert crash.startswith(reason)


def test_a_trial_that_hangs_is_ended_and_tried_again(drivers, undisturbed):
    study = drivers(hangs=2, hang_minutes=0.05)
    assert study.run() == 0, study.said()
    rows = settled(study, undisturbed)
    (crash,) = rows[2].notes[CRASHES]
    assert crash.startswith("hung: told nothing for 3 s, see ")
    assert (
        "time.sleep" in (study.out / "toy/0002/hung-1.txt").read_text()
        or "once" in (study.out / "toy/0002/hung-1.txt").read_text()
    )


def test_a_trial_is_not_tried_for_ever(drivers):
    study = drivers(always_raises=2, max_attempts=3)
    assert study.run() == 0, study.said()
    rows = settled(study, failed=[2])
    assert rows[2].notes[REASON] == "OSError: it always does"
    assert rows[2].notes[CRASHES] == ["OSError: it always does"] * 3
    # The same command leaves it as it is.
    assert study.run(always_raises=None) == 0
    settled(study, failed=[2])


def test_a_loss_that_is_not_finite_fails_its_trial_at_once(drivers):
    study = drivers(diverges_above=0.8)
    assert study.run() == 0, study.said()
    found, _ = points(study)
    diverged = [number for number, params, _, _ in found if params["x"] > 0.8]
    assert 0 < len(diverged) < 4
    rows = settled(study, failed=diverged)
    for number in diverged:
        assert rows[number].notes[REASON] == "Diverged: j_m is nan at epoch 1"
        assert rows[number].notes[ATTEMPTS] == 1


def test_a_worker_whose_memory_grows_is_replaced(drivers, undisturbed):
    study = drivers(leaks_mb=150)
    assert study.run() == 0, study.said()
    rows = settled(study, undisturbed)
    assert all(CRASHES not in row.notes for row in rows)
    # 750 MB a trial, and a gigabyte is what a worker may grow by: after two trials it is replaced.
    assert [row.notes[ATTEMPTS] for row in rows] == [1, 1, 2, 1, 2, 1, 2, 1]


def test_a_node_goes_in_the_middle(cluster, drivers, undisturbed):
    node = cluster.add_node(num_cpus=2, resources={"other": 2})
    study = drivers(parallel=4, sampler="random", pause=0.1)
    process = study.start()
    while len(list((study.out / "toy").glob("*/kept/epochs.json"))) < 4:
        process.join(0.05)
    cluster.remove_node(node, allow_graceful=False)
    process.join(120)
    assert process.exitcode == 0, study.said()
    settled(study)


def test_the_disk_is_full_at_a_checkpoint(drivers, undisturbed, tmp_path):
    with small_disk(tmp_path / "toy", 1) as disk:
        study = drivers(pause=0.1, max_attempts=1000)
        process = study.start()
        while not (disk / "0002/kept/epochs.json").exists():
            time.sleep(0.02)
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        while "No space left" not in study.said():
            process.join(0.05)
        (disk / "filler").unlink()
        process.join(120)
        assert process.exitcode == 0, study.said()
        rows = settled(study, undisturbed)
        assert any("No space left" in crash for row in rows for crash in row.notes.get(CRASHES, []))
