"""A Ray that outlives the drivers, and what an undisturbed study finds."""

import shutil

import mlflow
import pytest
from ray.cluster_utils import Cluster

from studies.machinery.resources import RAY_HABITS
from studies.machinery.storage import open_storage
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


@pytest.fixture(scope="session")
def blank(tmp_path_factory):
    """Databases that have their schema and nothing else; to make them takes longer than a toy study."""
    folder = tmp_path_factory.mktemp("blank")
    open_storage(f"sqlite:///{folder}/ledger.db").engine.dispose()
    mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return folder


@pytest.fixture(scope="session")
def study(cluster, blank):
    """A toy study in a folder: by itself on SQLite, and with the settings in TOY."""

    begun = []

    def begin(out, trials=TRIALS, environment=None, **settings):
        shutil.copytree(blank, out, dirs_exist_ok=True)
        own = {
            "RAY_ADDRESS": cluster.address,
            "HDML_LEDGER": f"sqlite:///{out}/ledger.db",
            "MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db",
        }
        begun.append(Drivers(out, trials, {**own, **(environment or {})}, **{**TOY, **settings}))
        return begun[-1]

    yield begin
    for drivers in begun:
        drivers.end()


@pytest.fixture
def drivers(study, tmp_path):
    """Drivers of a toy study in the test's own folder."""
    return lambda out=tmp_path, **settings: study(out, **settings)


@pytest.fixture(scope="session")
def undisturbed(study, tmp_path_factory):
    """What the toy study finds when nothing happens to it."""
    quiet = study(tmp_path_factory.mktemp("undisturbed"))
    assert quiet.run() == 0, quiet.said()
    settled(quiet)
    return points(quiet)
