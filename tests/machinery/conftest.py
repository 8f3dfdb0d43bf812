"""Ledgers and trackers in a temporary folder, and a Ray for the tests that run a driver in their own process."""

import mlflow
import pytest
import ray
from sqlalchemy import delete

from studies.machinery.lease import LEASES, Lease
from studies.machinery.ledger import Ledger
from studies.machinery.resources import start_ray
from studies.machinery.storage import open_storage
from studies.machinery.study import Study

# What the libraries warn themselves of.
LIBRARIES = ("ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning",)


def pytest_configure(config):
    for line in LIBRARIES:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path}/ledger.db")


@pytest.fixture
def begin(tmp_path):
    """Open a ledger as a new driver does; whoever had it before is dead."""

    def begun(name="study", space=None, **options):
        storage = open_storage(f"sqlite:///{tmp_path}/ledger.db")
        LEASES.metadata.create_all(storage.engine)
        with storage.engine.begin() as connection:
            connection.execute(delete(LEASES))
        return Ledger(storage, name, space or {}, Lease(storage.engine, name), **options)

    return begun


@pytest.fixture(scope="session")
def tracker(tmp_path_factory):
    """The address of an MLflow database; making its schema takes seconds, so tests share it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def client(tracker):
    return mlflow.MlflowClient(tracker)


@pytest.fixture(scope="module")
def local_ray():
    start_ray(Study("toy", "Why?", {}))
    yield
    ray.shutdown()
