"""A driver that dies, or is stopped, and the same command again: nothing lost, nothing twice."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import mlflow
import pytest

from studies.machinery.ledger import existing, open_storage
from tests.conftest import ROOT

pytestmark = pytest.mark.cluster
TRIALS = 8


@contextmanager
def driver(out):
    """A driver at work on the toy study, killed at the end if it is still there."""
    command = [sys.executable, "-m", "tests.machinery.toy_study", str(out), str(TRIALS), "0.3"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def finished(out):
    if not (out / "ledger.db").exists():
        return 0
    names = [row.state for row in existing(open_storage(f"sqlite:///{out}/ledger.db"), "toy").rows()]
    return sum(name != "RUNNING" for name in names)


def wait_for(out, process, trials):
    while process.poll() is None:
        try:
            if finished(out) >= trials:
                return
        except ValueError:
            pass  # the ledger is there, and the study is not yet
        time.sleep(0.2)
    pytest.fail(f"the driver ended by itself: {process.stderr.read()}")


def check(out):
    rows = existing(open_storage(f"sqlite:///{out}/ledger.db"), "toy").rows()
    assert [row.number for row in rows] == list(range(TRIALS))
    assert Counter(row.state for row in rows) == {"COMPLETE": TRIALS}
    assert all(list(row.reports) == [1, 2, 3, 4, 5] for row in rows)
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert Counter(run.info.status for run in runs) == {"FINISHED": TRIALS + 1}
    children = {run.data.tags["trial"]: run for run in runs if "trial" in run.data.tags}
    for row in rows:
        run = children[f"{row.number:04d}"]
        assert run.info.run_id == row.notes["mlflow_run"]
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/j_m")]
        assert steps == [10, 20, 30, 40, 50]
    return rows


def test_killed_twice_it_ends_as_if_it_had_not_been(tmp_path):
    for done in (2, 5):
        with driver(tmp_path) as process:
            wait_for(tmp_path, process, done)
    with driver(tmp_path) as process:
        assert process.wait() == 0
    rows = check(tmp_path)
    assert max(row.notes["attempts"] for row in rows) > 1


def test_interrupted_it_saves_and_goes_on(tmp_path):
    with driver(tmp_path) as process:
        wait_for(tmp_path, process, 2)
        os.kill(process.pid, signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate()[1]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("toy").experiment_id
    assert not client.search_runs([experiment], "attributes.status = 'RUNNING'")
    with driver(tmp_path) as process:
        assert process.wait() == 0
    check(tmp_path)
