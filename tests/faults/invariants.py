"""What must hold of a study once it is over, whatever happened to it."""

from collections import Counter
from contextlib import contextmanager

import mlflow
from sqlalchemy import select

from studies.machinery.lease import LEASES
from studies.machinery.ledger import ATTEMPTS, CHECKPOINTS, MLFLOW_RUN, existing
from studies.machinery.records import SECONDS, TAG_STATE, TAG_TRIAL
from studies.machinery.storage import open_storage
from tests.machinery.toys import EPOCHS, value

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED"}


@contextmanager
def opened(drivers):
    """The database of the study's ledger, for a look."""
    storage = open_storage(drivers.environment["HDML_LEDGER"])
    yield storage
    storage.engine.dispose()


def points(drivers):
    """What an undisturbed study tries and finds: parameters, state and values of every trial, and its best one."""
    with opened(drivers) as storage:
        ledger = existing(storage, "toy")
        return [(row.number, row.params, row.state, row.values) for row in ledger.rows()], ledger.best().number


def settled(drivers, undisturbed=None, failed=()):
    """No finished trial twice, none lost, nothing left RUNNING, each step of each series once, the same best trial."""
    with opened(drivers) as storage:
        rows = existing(storage, "toy").rows()
        with storage.engine.connect() as connection:
            assert connection.execute(select(LEASES)).all() == []
    assert [row.number for row in rows] == list(range(drivers.trials))
    assert {row.number for row in rows if row.state == "FAIL"} == set(failed)
    for row in rows:
        if row.state == "COMPLETE":
            assert row.reports == {epoch: value(row.params["x"], epoch) for epoch in range(1, EPOCHS + 1)}
            assert row.values == (value(row.params["x"]),)
        assert row.state in STATUS
        assert row.notes[ATTEMPTS] >= 1
        assert CHECKPOINTS in row.notes
    if undisturbed is not None:
        assert points(drivers) == undisturbed
    recorded(drivers, rows)
    return rows


def recorded(drivers, rows):
    """The tracker has one run for each trial, ended as the trial did, with every step of every series once."""
    client = mlflow.MlflowClient(drivers.environment["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id], max_results=5000)
    children = [run for run in runs if TAG_TRIAL in run.data.tags]
    (parent,) = [run for run in runs if TAG_TRIAL not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert Counter(run.data.tags[TAG_TRIAL] for run in children) == {f"{row.number:04d}": 1 for row in rows}
    by_trial = {run.data.tags[TAG_TRIAL]: run for run in children}
    for row in rows:
        run = by_trial[f"{row.number:04d}"]
        assert run.info.status == STATUS[row.state]
        assert run.data.tags[TAG_STATE] == row.state
        assert row.notes.get(MLFLOW_RUN, run.info.run_id) == run.info.run_id
        told = sorted(row.reports)
        for name in (SECONDS, "train/j_m"):
            steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
            assert steps == [10 * epoch for epoch in told], (row.number, name)
        trace = [point.step for point in client.get_metric_history(run.info.run_id, "hardness/kept")]
        assert trace == list(range(1, 10 * len(told) + 1))
