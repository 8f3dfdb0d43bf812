"""A Ray that outlives the drivers, and what an undisturbed study finds."""

import pytest
from ray.cluster_utils import Cluster

from studies.machinery.driver import RAY_HABITS
from tests.faults.drivers import Drivers
from tests.faults.invariants import points, settled
from tests.machinery.conftest import LIBRARIES

TRIALS = 8
TOY = {"sampler": "tpe", "parallel": 1}


def pytest_configure(config):
    for line in LIBRARIES:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def cluster():
    """A Ray of one node with two cores; drivers come and go."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_HABITS.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield cluster
        cluster.shutdown()


@pytest.fixture
def drivers(cluster, tmp_path):
    """Drivers of a toy study on SQLite."""

    def of(out=tmp_path, trials=TRIALS, environment=None, **settings):
        own = {
            "RAY_ADDRESS": cluster.address,
            "HDML_LEDGER": f"sqlite:///{out}/ledger.db",
            "MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db",
        }
        return Drivers(out, trials, {**own, **(environment or {})}, **{**TOY, **settings})

    return of


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory):
    """What the toy study finds when nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed")
    environment = {
        "RAY_ADDRESS": cluster.address,
        "HDML_LEDGER": f"sqlite:///{out}/ledger.db",
        "MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db",
    }
    quiet = Drivers(out, TRIALS, environment, **TOY)
    assert quiet.run() == 0, quiet.said()
    settled(quiet)
    return points(quiet)
