"""A real MLflow server that refuses, hangs, answers 500, loses its replies, stops: training never waits for it."""

import time

import mlflow
import pytest

from studies.machinery import review
from studies.machinery.driver import Places
from tests.faults import chosen
from tests.faults.invariants import settled
from tests.services import FaultyProxy

pytestmark = pytest.mark.cluster


@pytest.fixture
def proxied(drivers, mlflow_server, monkeypatch, request):
    """A study that reaches the server through a proxy which can fail; what other tests left there is put aside."""
    client = mlflow.MlflowClient(mlflow_server.url)
    left = client.get_experiment_by_name("toy")
    if left is not None:
        client.rename_experiment(left.experiment_id, f"toy before {request.node.name}")
    with FaultyProxy(mlflow_server.url) as proxy:
        study = drivers(environment={"MLFLOW_TRACKING_URI": proxy.url})
        for name, value in study.environment.items():
            monkeypatch.setenv(name, value)
        yield study, proxy


MODES = ["refuse", "hang", "error", "drop_reply"]


@pytest.mark.parametrize("mode", chosen(MODES, ["refuse"]))
def test_gone_for_the_whole_study(proxied, undisturbed, mode):
    study, proxy = proxied
    proxy.mode = mode
    assert study.run() == 0, study.said()
    proxy.mode = "through"
    review.sync("toy", Places.under(study.out))
    settled(study, undisturbed)


@pytest.mark.parametrize("mode", chosen(MODES, ["drop_reply"]))
def test_gone_in_the_middle(proxied, undisturbed, mode):
    study, proxy = proxied
    process = study.start(pause=0.1)
    while not list((study.out / "toy").glob("0002/kept/epochs.json")):
        time.sleep(0.05)
    proxy.mode = mode
    while not list((study.out / "toy").glob("0005/kept/epochs.json")):
        time.sleep(0.05)
    proxy.mode = "through"
    process.join(120)
    assert process.exitcode == 0, study.said()
    review.sync("toy", Places.under(study.out))
    settled(study, undisturbed)


def test_stopped_and_started_again(proxied, undisturbed, mlflow_server):
    study, _ = proxied
    process = study.start(pause=0.1)
    while not list((study.out / "toy").glob("0002/kept/epochs.json")):
        time.sleep(0.05)
    mlflow_server.stop()
    process.join(120)
    assert process.exitcode == 0, study.said()
    mlflow_server.start()
    review.sync("toy", Places.under(study.out))
    settled(study, undisturbed)
