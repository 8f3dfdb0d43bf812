"""The recorder against a real MLflow database: every point once, every status true."""

from datetime import datetime

import pytest

from studies.machinery.ledger import Row
from studies.machinery.records import SECONDS, Record
from studies.machinery.tracking import Recorder, TrackerError


def row(number=0, attempts=1, **notes):
    began = datetime.fromtimestamp(1_700_000_000)
    return Row(number, {"hdml.alpha": 31.6}, "RUNNING", None, {}, {"attempts": attempts, **notes}, began, 0.0)


def record(epoch, last=False):
    metrics = {SECONDS: 2.0 * epoch, "train/j_m": 1.0 / epoch, "validation/recall_at_1": 0.1 * epoch}
    trace = {"hardness/kept": tuple((10 * (epoch - 1) + i, 0.5) for i in range(1, 11))}
    return Record(epoch, 10 * epoch, 2.0 * epoch, metrics, trace, {"device": "cpu"}, last)


@pytest.fixture
def recorder(tracker, tmp_path, request):
    recorder = Recorder(tracker, request.node.name, tmp_path)
    recorder.open("study", "Why?\n\nBecause.", {"commit": "abc", "data_digest": "0"}, None)
    return recorder


def runs(client, recorder):
    found = client.search_runs([recorder.experiment], order_by=["attributes.start_time"])
    return {run.info.run_name: run for run in found}


def test_a_trial_is_a_child_run_with_its_settings_and_series(recorder, client):
    with recorder:
        run_id = recorder.begin("search", row(7), {"hdml.alpha": 31.6, "retrieval.ks": (1, 2)})
        recorder.log("search", 7, record(1))
        recorder.log("search", 7, record(2, last=True))
        recorder.end("search", 7, "COMPLETE")
    found = runs(client, recorder)
    parent, child = found["study"], found["0007 alpha=31.6"]
    assert child.info.run_id == run_id
    assert parent.data.tags["mlflow.note.content"] == "Why?\n\nBecause."
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"hdml.alpha": "31.6", "retrieval.ks": "(1, 2)"}
    tags = {
        "commit": "abc",
        "data_digest": "0",
        "trial": "0007",
        "kind": "search",
        "state": "COMPLETE",
        "device": "cpu",
    }
    assert tags.items() <= child.data.tags.items()
    assert [run.info.status for run in (parent, child)] == ["FINISHED", "FINISHED"]
    history = client.get_metric_history(run_id, "validation/recall_at_1")
    assert [(point.step, point.value, point.timestamp) for point in history] == [
        (10, 0.1, 1_700_000_002_000),
        (20, 0.2, 1_700_000_004_000),
    ]
    assert [point.step for point in client.get_metric_history(run_id, "hardness/kept")] == list(range(1, 21))


def test_what_is_told_again_is_recorded_once(recorder, client):
    run_id = recorder.begin("search", row(), {"hdml.alpha": 31.6})
    recorder.log("search", 0, record(1))

    later = Recorder(recorder._uri, client.get_experiment(recorder.experiment).name)
    later.open("study", "Why?", {}, recorder._parent)
    with later:
        # The ledger was not told the run's id before the driver went: the run is found by its tags.
        assert later.begin("search", row(attempts=2), {"hdml.alpha": 31.6}) == run_id
        for epoch in (1, 2):
            later.log("search", 0, record(epoch, last=epoch == 2))
        later.end("search", 0, "COMPLETE")
        # It was ended here, and not in the ledger.
        assert later.begin("search", row(attempts=3, mlflow_run=run_id), {}) == run_id
        for epoch in (1, 2):
            later.log("search", 0, record(epoch, last=epoch == 2))
        later.end("search", 0, "COMPLETE")
    recorder._monitor.finish()
    for name in ("train/j_m", SECONDS):
        assert [point.step for point in client.get_metric_history(run_id, name)] == [10, 20]
    assert len(runs(client, recorder)) == 2


@pytest.mark.parametrize(("state", "status"), [("COMPLETE", "FINISHED"), ("PRUNED", "FINISHED"), ("FAIL", "FAILED")])
def test_statuses_are_true(recorder, client, state, status):
    with recorder:
        run_id = recorder.begin("search", row(), {})
        recorder.end("search", 0, state, "Diverged: j_m is nan" if state == "FAIL" else "")
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["state"]) == (status, state)
    assert run.data.tags.get("reason") == ("Diverged: j_m is nan" if state == "FAIL" else None)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_no_run_is_left_running(recorder, client, error, status):
    def fail():
        with recorder:
            recorder.begin("search", row(), {})
            raise error

    with pytest.raises(error):
        fail()
    found = runs(client, recorder)
    assert {name: run.info.status for name, run in found.items()} == {"study": status, "0000 alpha=31.6": "KILLED"}


def test_an_experiment_put_aside_keeps_its_runs(recorder, client):
    recorder.begin("search", row(), {})
    recorder._monitor.finish()
    recorder.set_aside("put aside")
    assert {run.info.status for run in runs(client, recorder).values()} == {"KILLED"}
    assert client.get_experiment_by_name("put aside").experiment_id == recorder.experiment


@pytest.mark.parametrize("uri", ["nonsense://host", "runs/mlruns", "sqlite:////proc/nowhere/mlflow.db"])
def test_an_address_of_no_tracker_is_refused(uri):
    with pytest.raises(TrackerError, match=f"MLflow at {uri} can't be used: ") as refused:
        Recorder(uri, "study")
    assert "\n" not in str(refused.value)
