"""The recorder against real MLflow databases and servers: every point once, every status true, nobody waiting."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import mlflow
import pytest

from studies.machinery import experiment as experiments
from studies.machinery import tracking
from studies.machinery.experiment import Experiment, TrackerError
from studies.machinery.ledger import Row
from studies.machinery.records import HELD_MEMORY, SECONDS, TAG_ATTEMPT, TAG_DEVICE, Record
from studies.machinery.spool import REFUSED, Spool, refused
from studies.machinery.tracking import Recorder, set_aside, synchronise
from tests.services import FaultyProxy, free_port

PROCESSES = multiprocessing.get_context("forkserver")
# Forked from a process that has imported everything, a driver starts at once.
PROCESSES.set_forkserver_preload(["studies.machinery.driver"])
BEGAN = 1_700_000_000
EPOCHS = 3


def row(number=0, attempt=1):
    return Row(
        number, {"hdml.alpha": 31.6}, "RUNNING", (), {}, {"attempts": attempt}, datetime.fromtimestamp(BEGAN + number)
    )


def record(epoch, attempt=1):
    """An epoch; told again it is the same, but for the memory that the worker then happens to hold."""
    metrics = {SECONDS: 2.0 * epoch, "train/j_m": 1.0 / epoch, HELD_MEMORY: 100.0 * attempt}
    return Record(
        epoch=epoch,
        step=10 * epoch,
        seconds=2.0 * epoch,
        metrics=metrics,
        part=0,
        part_qualities={},
        ends_part=epoch == EPOCHS,
        trace={"hardness/kept": tuple((10 * (epoch - 1) + i, 0.5) for i in range(1, 11))},
        tags={TAG_DEVICE: "cpu", TAG_ATTEMPT: str(attempt)},
        last=epoch == EPOCHS,
    )


def trial(recorder, number=0, attempt=1, state="COMPLETE", epochs=EPOCHS):
    """A trial from its begin to its end, all its epochs told."""
    recorder.begin("search", row(number, attempt), {"hdml.alpha": 31.6, "retrieval.ks": (1, 2)})
    for epoch in range(1, epochs + 1):
        recorder.log("search", number, record(epoch, attempt))
    if state is not None:
        recorder.end("search", number, state)


class Place:
    """Where a study is recorded, and what is found there."""

    def __init__(self, uri, folder, study="study", study_id="1"):
        self.uri, self.folder, self.study, self.study_id = uri, folder, study, study_id
        self.spool = folder / "spool"

    def recorder(self):
        return Recorder(self.uri, self.study, self.study_id, self.spool, self.folder / "artifacts")

    def opened(self):
        recorder = self.recorder()
        recorder.open("Why?\n\nBecause.", {"commit": "abc"})
        return recorder

    def synchronise(self):
        return synchronise(self.uri, self.study, self.study_id, self.spool, self.folder / "artifacts")

    def experiment(self):
        return Experiment(self.uri, self.study, self.study_id)

    def runs(self):
        return {(run.kind, run.trial): run for run in self.experiment().runs()}

    def series(self, metric, kind="search", number=0):
        """(step, value) points of a metric of one run."""
        run = self.runs()[kind, number]
        return self.experiment().series([run], metric)[run.run_id]

    def statuses(self):
        return {key: run.status for key, run in self.runs().items()}

    def client(self):
        return mlflow.MlflowClient(self.uri)

    def run(self, kind="search", number=0):
        return self.client().get_run(self.runs()[kind, number].run_id)

    def is_whole(self, trials, epochs=EPOCHS):
        """One run for each trial, every step of every series once, nothing RUNNING, nothing left to be sent."""
        found = [run for run in self.experiment().runs() if run.trial is not None]
        assert Counter(run.trial for run in found) == Counter(range(trials))
        assert "RUNNING" not in self.statuses().values()
        for metric in (SECONDS, "train/j_m", HELD_MEMORY):
            steps = [[step for step, _ in points] for points in self.experiment().series(found, metric).values()]
            assert steps == [[10 * epoch for epoch in range(1, epochs + 1)]] * trials, metric
        for points in self.experiment().series(found, "hardness/kept").values():
            assert sorted(points) == [(step, 0.5) for step in range(1, 10 * epochs + 1)]
        assert list(self.spool.iterdir()) == []


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An MLflow database without a study; making the schema takes seconds."""
    folder = tmp_path_factory.mktemp("template")
    Experiment(f"sqlite:///{folder}/mlflow.db", "", "")
    return folder / "mlflow.db"


@pytest.fixture
def place(template, tmp_path):
    shutil.copy(template, tmp_path / "mlflow.db")
    return Place(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(tracking, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.1)
    monkeypatch.setitem(experiments.HABITS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def sent(recorder):
    """Wait until the tracker has taken all."""
    while recorder.unsent:
        time.sleep(0.01)


def abandoned(place, epochs=2, attempt=1, number=0):
    """What a driver leaves that was killed in a trial, its last events unsent."""
    recorder = place.recorder()
    recorder._sender = threading.Thread(target=list)
    recorder.open("Why?", {})
    trial(recorder, number, attempt, None, epochs)
    recorder._over.set()
    recorder._own.close()


def test_a_trial_is_a_child_run_with_its_settings_and_series(place):
    with place.opened() as recorder:
        assert recorder.run_id("search", 7) is None
        trial(recorder, 7, state=None)
        sent(recorder)
        run_id = recorder.run_id("search", 7)
        recorder.end("search", 7, "COMPLETE")
    parent, child = place.run("study", None), place.run("search", 7)
    assert child.info.run_id == run_id
    assert (parent.info.run_name, child.info.run_name) == ("study", "0007 alpha=31.6")
    assert parent.data.tags["mlflow.note.content"] == "Why?\n\nBecause."
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"hdml.alpha": "31.6", "retrieval.ks": "(1, 2)"}
    tags = {"commit": "abc", "trial": "0007", "kind": "search", "state": "COMPLETE", "device": "cpu", "attempt": "1"}
    assert tags.items() <= child.data.tags.items()
    assert "device" not in parent.data.tags
    history = place.client().get_metric_history(run_id, "train/j_m")
    began = 1000 * (BEGAN + 7)
    assert [(point.step, point.value, point.timestamp) for point in history] == [
        (10, 1.0, began + 2000),
        (20, 1.0 / 2, began + 4000),
        (30, 1.0 / 3, began + 6000),
    ]
    assert place.statuses() == {("study", None): "FINISHED", ("search", 7): "FINISHED"}


def test_what_is_told_again_is_recorded_once(place):
    with place.opened() as recorder:
        trial(recorder, state=None, epochs=2)
        trial(recorder, attempt=2, state=None, epochs=2)
        sent(recorder)
        run_id = recorder.run_id("search", 0)
    for attempt in (3, 4):
        with place.opened() as recorder:
            trial(recorder, attempt=attempt)
    place.is_whole(1)
    assert place.run().info.run_id == run_id
    assert place.run().data.tags["attempt"] == "4"


@pytest.mark.parametrize(("state", "status"), [("COMPLETE", "FINISHED"), ("PRUNED", "FINISHED"), ("FAIL", "FAILED")])
def test_statuses_are_true(place, state, status):
    reason = "Diverged: j_m is nan" if state == "FAIL" else ""
    with place.opened() as recorder:
        recorder.begin("search", row(), {})
        recorder.end("search", 0, state, reason)
    run = place.run()
    assert (run.info.status, run.data.tags["state"]) == (status, state)
    assert run.data.tags.get("reason", "") == reason


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_no_run_is_left_running(place, error, status):
    def fail():
        with place.opened() as recorder:
            trial(recorder, 0)
            trial(recorder, 1, state=None)
            raise error

    with pytest.raises(error):
        fail()
    assert place.statuses() == {("study", None): status, ("search", 0): "FINISHED", ("search", 1): "KILLED"}
    with place.opened() as recorder:
        sent(recorder)
        assert place.statuses()["study", None] == "RUNNING"
        trial(recorder, 1, attempt=2)
    assert set(place.statuses().values()) == {"FINISHED"}
    place.is_whole(2)


def test_a_note_is_a_run_of_its_own_and_once(place):
    for _ in range(2):
        with place.opened() as recorder:
            recorder.note("confirm-1", {"kind": "confirm", "seeds": "5"}, {"test/recall_at_1_best": 0.5})
    run = place.run("confirm", None)
    assert (run.info.run_name, run.info.status, run.data.tags["seeds"]) == ("confirm-1", "FINISHED", "5")
    assert run.data.tags["mlflow.parentRunId"] == place.runs()["study", None].run_id
    assert place.series("test/recall_at_1_best", "confirm", None) == [(0, 0.5)]
    assert len(place.runs()) == 2


def test_the_machine_is_watched(place, monkeypatch):
    monkeypatch.setattr(tracking, "OBSERVE_EVERY", 0.05)
    with place.opened() as recorder:
        time.sleep(0.3)
        sent(recorder)
    parent = place.runs()["study", None]
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= parent.metrics.keys()
    points = place.series("system/cpu_utilization_percentage", "study", None)
    assert len({step for step, _ in points}) == len(points) > 1


def test_studies_of_one_name_share_an_experiment_and_nothing_else(place):
    other = Place(place.uri, place.folder / "other", study_id="2")
    for each in (place, other):
        with each.opened() as recorder:
            trial(recorder, epochs=EPOCHS)
        each.is_whole(1)
    assert not {run.run_id for run in place.runs().values()} & {run.run_id for run in other.runs().values()}


def test_an_experiment_put_aside_keeps_its_runs(place):
    set_aside(place.uri, "study", "nothing there")
    abandoned(place)
    (spool,), _ = Spool.left(place.spool)
    tracking.forward(spool, place.experiment())
    assert set(place.statuses().values()) == {"RUNNING"}
    set_aside(place.uri, "study", "put aside")
    assert place.runs() == {}
    place.study = "put aside"
    assert place.statuses() == {("study", None): "KILLED", ("search", 0): "KILLED"}


def test_what_was_deleted_is_made_again_or_restored(place):
    with place.opened() as recorder:
        trial(recorder)
    client = place.client()
    client.delete_run(place.runs()["search", 0].run_id)
    client.delete_experiment(client.get_experiment_by_name("study").experiment_id)
    with place.opened() as recorder:
        trial(recorder, attempt=2)
    place.is_whole(1)


def test_a_run_that_a_slow_server_makes_twice_stays_once(place):
    with place.opened() as recorder:
        trial(recorder, state=None)
        sent(recorder)
        run = place.run()
        own = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
        place.client().create_run(run.info.experiment_id, run.info.start_time, own)
        recorder.end("search", 0, "COMPLETE")
    assert place.run().info.run_id == run.info.run_id
    place.is_whole(1)


def test_what_mlflow_refuses_is_set_aside_and_keeps_nothing_else_waiting(place, capsys):
    unheard = record(2)._replace(metrics={**record(2).metrics, "recall@1": 1.0})
    with place.opened() as recorder:
        recorder.begin("search", row(), {"hdml.alpha": 31.6})
        recorder.log("search", 0, record(1))
        recorder.log("search", 0, unheard)
        recorder.log("search", 0, record(3))
        recorder.end("search", 0, "COMPLETE")
        # Parameters do not change in MLflow: those that the run was begun with stay.
        recorder.begin("search", row(attempt=2), {"hdml.alpha": 90.0, "hdml.beta": 1.0})
        recorder.end("search", 0, "COMPLETE")
    assert place.run().data.params == {"hdml.alpha": "31.6", "hdml.beta": "1.0"}
    assert place.run().info.status == "FINISHED"
    assert [step for step, _ in place.series(SECONDS)] == [10, 30]
    assert refused(place.spool) == 1
    kept = json.loads((place.spool / REFUSED).read_text())
    assert kept["step"] == 20
    assert "recall@1" in kept["refused"]
    assert f"events that MLflow refused: 1, kept in {place.spool / REFUSED}" in capsys.readouterr().err


def test_what_an_earlier_attempt_is_late_to_say_changes_nothing(place):
    abandoned(place)
    (late,), _ = Spool.left(place.spool)
    with place.opened() as recorder:
        trial(recorder, attempt=2, state=None)
        sent(recorder)
        late.close()
        place.synchronise()
        assert place.statuses() == {("study", None): "RUNNING", ("search", 0): "RUNNING"}
        assert place.run().data.tags["attempt"] == "2"
        recorder.end("search", 0, "COMPLETE")
    place.is_whole(1)


def test_a_driver_that_was_taken_for_dead_has_no_say(place):
    silent = place.opened()
    trial(silent, state=None)
    sent(silent)
    with place.opened() as recorder:
        trial(recorder, attempt=2)
    with pytest.raises(RuntimeError), silent:
        raise RuntimeError
    place.is_whole(1)
    assert set(place.statuses().values()) == {"FINISHED"}


def test_of_two_drivers_the_one_that_lives_ends_the_study(place):
    with place.opened() as recorder:
        abandoned(place, number=1)
        (late,), _ = Spool.left(place.spool)
        while tracking.forward(late, place.experiment()):
            pass
        trial(recorder)
        sent(recorder)
        late.close()
    assert place.statuses() == {("study", None): "FINISHED", ("search", 0): "FINISHED", ("search", 1): "RUNNING"}
    place.synchronise()
    assert place.statuses() == {("study", None): "FINISHED", ("search", 0): "FINISHED", ("search", 1): "KILLED"}


def test_an_experiment_that_another_driver_made_since_it_was_looked_for_is_taken(place, monkeypatch):
    with place.opened() as recorder:
        sent(recorder)
    experiment, looks = place.experiment(), []
    find = experiment._find_experiment
    monkeypatch.setattr(experiment, "_find_experiment", lambda: looks.append(find()) if not looks else find())
    assert experiment.tell([]) == []
    assert experiment._id == looks[0]


def test_a_living_driver_is_left_to_send_what_is_its_own(place, capsys):
    with place.opened() as recorder:
        trial(recorder, state=None)
        sent(recorder)
        assert place.synchronise() == 0
        assert capsys.readouterr().err == "drivers at work on study: 1; they send what is theirs themselves\n"
        assert place.statuses()["search", 0] == "RUNNING"
        recorder.end("search", 0, "COMPLETE")
    place.is_whole(1)


def test_what_a_dead_driver_left_is_sent_and_ended(place):
    abandoned(place, epochs=EPOCHS)
    assert place.synchronise() == 1 + 1 + EPOCHS + 1
    assert place.statuses() == {("study", None): "KILLED", ("search", 0): "KILLED"}
    place.is_whole(1)
    assert place.synchronise() == 0


def test_a_run_whose_spool_is_lost_is_ended_too(place):
    abandoned(place)
    (spool,), _ = Spool.left(place.spool)
    tracking.forward(spool, place.experiment())
    shutil.rmtree(place.spool)
    place.synchronise()
    assert set(place.statuses().values()) == {"KILLED"}


# A driver killed at each seam between spool and tracker.

CALLS = ["create_run", "log_batch", "update_run", "set_terminated", "acknowledge", "append"]


def driver_killed(place, call, when, nth):
    """A driver of two trials, killed at the nth call."""
    owner = Spool if hasattr(Spool, call) else mlflow.MlflowClient
    original = getattr(owner, call)
    calls = 0

    def hooked(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == nth and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, call, hooked)
    # Many small steps, each of them a place to die at.
    tracking.LOOK_EVERY, tracking.CHUNK, experiments.POINTS = 0.02, 2, 7
    with place.opened() as recorder:
        for number in range(2):
            trial(recorder, number)
            sent(recorder)


@pytest.mark.parametrize(("nth", "next_comes"), [(1, "driver"), (2, "sync"), (3, "driver")])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_a_driver_killed_anywhere_loses_nothing_and_doubles_nothing(place, call, when, nth, next_comes):
    driver = PROCESSES.Process(target=driver_killed, args=(place, call, when, nth))
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    if next_comes == "sync":
        place.synchronise()
        assert "RUNNING" not in place.statuses().values()
    # As the ledger has it: both trials still in hand, their epochs told again.
    with place.opened() as recorder:
        for number in range(2):
            trial(recorder, number, attempt=2)
    place.is_whole(2)
    assert set(place.statuses().values()) == {"FINISHED"}


# Addresses.


@pytest.mark.parametrize(
    "uri",
    [
        "nonsense://host",
        "runs/mlruns",
        "sqlite:////proc/nowhere/mlflow.db",
        "http://",
        "http://host:port",
        "postgresql+nothing://host/mlflow",
    ],
)
def test_an_address_of_no_tracker_is_refused(uri, tmp_path):
    with pytest.raises(TrackerError, match=f"MLflow at {uri} can't be used: ".replace("+", r"\+")) as told:
        Recorder(uri, "study", "1", tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg"])
def test_an_address_where_nobody_answers_just_now_is_an_address(scheme, tmp_path):
    uri = f"{scheme}://user:secret@127.0.0.1:{free_port()}/mlflow"
    place = Place(uri, tmp_path)
    place.recorder()
    for ask in (place.synchronise, place.runs, lambda: set_aside(uri, "study", "aside")):
        with pytest.raises(TrackerError, match=rf"MLflow at {scheme}://user:\*\*\*@".replace("+", r"\+")):
            ask()


def test_a_spool_that_cannot_be_written_is_told(place):
    place.spool = Path("/proc/spool")
    with pytest.raises(TrackerError, match="the spool /proc/spool can't be written: No such file or directory"):
        place.opened()


# A real server, and the line to it.


@pytest.fixture
def line(mlflow_server):
    with FaultyProxy(mlflow_server.url) as proxy:
        yield proxy


@pytest.fixture
def served(line, tmp_path, request):
    return Place(line.url, tmp_path, request.node.name)


def test_a_server_gets_what_a_database_gets(served):
    with served.opened() as recorder:
        for number in range(2):
            trial(recorder, number)
    served.is_whole(2)
    found = list(served.runs().values())
    for metric in ("train/j_m", "hardness/kept"):
        for run_id, points in served.experiment().series(found, metric).items():
            assert points == [(p.step, p.value) for p in served.client().get_metric_history(run_id, metric)]


@pytest.mark.parametrize("mode", ["refuse", "hang", "error", "drop_reply"])
def test_a_tracker_gone_for_the_whole_study_costs_a_later_sync(served, line, mode, capsys):
    line.mode = mode
    with served.opened() as recorder:
        for number in range(2):
            trial(recorder, number)
    assert f"unsent events: {1 + 2 * (EPOCHS + 2) + 1}, kept in" in capsys.readouterr().err
    with pytest.raises(TrackerError):
        served.synchronise()
    line.mode = "through"
    assert served.synchronise() == 1 + 2 * (EPOCHS + 2) + 1
    served.is_whole(2)
    assert set(served.statuses().values()) == {"FINISHED"}


@pytest.mark.parametrize("mode", ["refuse", "hang", "error", "drop_reply"])
def test_a_tracker_gone_in_the_middle_is_caught_up_with(served, line, mode):
    with served.opened() as recorder:
        for number in range(4):
            recorder.begin("search", row(number), {"hdml.alpha": 31.6})
            line.mode = mode if number % 2 else "through"
            for epoch in range(1, EPOCHS + 1):
                recorder.log("search", number, record(epoch))
                time.sleep(0.05)
            recorder.end("search", number, "COMPLETE")
        line.mode = "through"
        sent(recorder)
    served.is_whole(4)
    assert set(served.statuses().values()) == {"FINISHED"}


def test_a_server_stopped_and_started_again_is_caught_up_with(served, mlflow_server, capsys):
    with served.opened() as recorder:
        trial(recorder, 0)
        mlflow_server.stop()
        trial(recorder, 1)
        while "what it misses is kept" not in capsys.readouterr().err:
            time.sleep(0.05)
        mlflow_server.start()
        trial(recorder, 2)
    served.is_whole(3)


def test_nobody_waits_for_a_tracker_that_hangs(served, line, monkeypatch):
    """All that is asked of the tracker is asked by the sender; nothing here has an answer to return on."""
    asked_by = set()
    original = Experiment.tell

    def tell(self, events):
        asked_by.add(threading.current_thread().name)
        return original(self, events)

    monkeypatch.setattr(Experiment, "tell", tell)
    line.mode = "hang"
    recorder = served.opened()
    for number in range(3):
        trial(recorder, number)
        assert recorder.run_id("search", number) is None
    assert recorder.unsent == 1 + 3 * (EPOCHS + 2)
    line.mode = "through"
    with recorder:
        sent(recorder)
    assert asked_by == {"sender"}
    served.is_whole(3)
