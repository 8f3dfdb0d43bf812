"""A trial's folder belongs to its latest attempt, and its checkpoints reach the driver's disk from any machine."""

import os
from dataclasses import replace

import pytest
import ray
from ray.exceptions import RayActorError

from studies.machinery import store
from studies.machinery.postmortem import tails
from studies.machinery.store import (
    SupersededError,
    bring,
    demand_ownership,
    keep,
    latest_attempt,
    leave,
    opened,
    take_over,
)
from studies.machinery.worker import Job


def job(folder, attempt=1, **fields):
    return Job("search", 7, attempt, {}, ({},), folder, folder / "trials" / "0007", 1, 0.0, 60.0, **fields)


def test_a_later_attempt_fences_off_an_earlier_one(tmp_path):
    first, second = job(tmp_path, 1), job(tmp_path, 2)
    take_over(first)
    demand_ownership(first)
    take_over(second)
    demand_ownership(second)
    for refused in (take_over, demand_ownership):
        with pytest.raises(SupersededError, match="attempt 1 at .*0007 was superseded by attempt 2"):
            refused(first)
    demand_ownership(second)
    assert [path.name for path in second.folder.iterdir()] == ["attempt.json"]
    assert latest_attempt(second.folder).number == 2


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A study's store as a machine has it that does not see the study's folder: its mark is nowhere to be found."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)
        with opened(folder) as its:
            assert its.is_seen(folder / "trials")
            assert not its.is_seen(folder.parent)
            (folder / its.mark).rename(folder / "elsewhere")
            yield its
        assert sorted(path.name for path in folder.iterdir()) == ["elsewhere", "trials"]
    ray.shutdown()


def write(folder, name, content):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "run.json").write_text(content)
    return folder / name


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("run.json")}


@pytest.mark.cluster
def test_checkpoints_of_a_far_machine_are_kept_and_brought_to_the_next(far, tmp_path, monkeypatch):
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "one"))
    first = take_over(job(far.folder, store=far))
    assert first.kept_in == far.folder / "trials/0007"
    assert tmp_path in first.folder.parents
    here = ray.get_runtime_context().get_node_id()
    assert latest_attempt(first.kept_in)[:3] == (1, [here], str(first.folder))
    bring(first, first.folder / "part-00")
    assert contents(first.folder) == {}
    for epoch in (1, 2, 3):
        keep(first, write(first.folder, f"part-00/epoch-{epoch}", f"epoch {epoch}"))
    # As the worker drops an old one, so does the keeper, at the next.
    (first.folder / "part-00/epoch-1/run.json").unlink()
    (first.folder / "part-00/epoch-1").rmdir()
    keep(first, write(first.folder, "part-00/epoch-4", "epoch 4"))
    two_to_four = {f"part-00/epoch-{epoch}/run.json": f"epoch {epoch}" for epoch in (2, 3, 4)}
    assert contents(first.kept_in) == two_to_four

    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "two"))
    second = take_over(job(far.folder, 2, store=far))
    assert second.folder != first.folder
    bring(second, second.folder / "part-00")
    assert contents(second.folder) == two_to_four
    # The first is refused, whatever it writes, and what is kept stays.
    with pytest.raises(SupersededError, match="attempt 1 at .*0007 was superseded by attempt 2"):
        keep(first, write(first.folder, "part-00/epoch-5", "epoch 5"))
    assert contents(second.kept_in) == two_to_four
    leave(second)
    assert not second.folder.exists()


@pytest.mark.cluster
def test_a_keeper_that_dies_is_started_again(far, tmp_path, monkeypatch):
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path))
    first = take_over(replace(job(far.folder, store=far), number=5, folder=far.folder / "trials/0005"))
    keep(first, write(first.folder, "part-00/epoch-1", "epoch 1"))
    with pytest.raises(RayActorError):
        ray.get(far.keeper.__ray_call__.options(max_task_retries=0).remote(lambda keeper: os._exit(1)))
    keep(first, write(first.folder, "part-00/epoch-2", "epoch 2"))
    assert len(contents(first.kept_in)) == 2


@pytest.mark.cluster
def test_what_an_older_study_left_on_a_far_machine_is_not_taken_up(far, tmp_path, monkeypatch):
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path))
    eighth = replace(job(far.folder, store=far), number=8, folder=far.folder / "trials/0008")
    first = take_over(eighth)
    write(first.folder, "part-00/epoch-9", "of long ago")
    again = take_over(eighth)
    assert again.folder == first.folder
    assert contents(again.folder) == {}
    # Nor is what an earlier attempt may still be writing there.
    assert take_over(replace(eighth, attempt=2)).folder != first.folder


@pytest.mark.cluster
def test_where_the_folder_is_seen_nothing_is_copied(far):
    (far.folder / far.mark).touch()
    here = take_over(replace(job(far.folder, store=far), number=9, folder=far.folder / "trials/0009"))
    (far.folder / far.mark).unlink()
    assert here.kept_in is None
    write(here.folder, "part-00/epoch-1", "epoch 1")
    keep(here, here.folder / "part-00/epoch-1")
    leave(here)
    assert contents(here.folder) == {"part-00/epoch-1/run.json": "epoch 1"}


def test_on_a_ray_of_this_machine_there_is_no_keeper(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with opened(tmp_path) as its:
        assert its is None
    assert not os.listdir(tmp_path)


def test_of_a_long_log_its_end_is_told_and_nothing_from_before_the_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.machinery.postmortem.LOG_TAIL", 10)
    log = tmp_path / "log"
    log.write_text("another trial's; this one's own")
    path = str(log)
    assert tails({path: 24}) == {path: "e's own"}
    log.write_text("half a secret\nwhole\n")
    assert tails({path: 0}) == {path: "whole\n"}
    assert tails({str(tmp_path / "nowhere"): 0}) == {}


def test_a_folder_whose_owner_wrote_no_claim_has_none(tmp_path):
    assert latest_attempt(tmp_path) is None
