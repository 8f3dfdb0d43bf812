"""Ledgers and trackers in a temporary folder, and a Ray for the tests that run a driver in their own process."""

import mlflow
import pytest
import ray

from studies.machinery.driver import start_ray
from studies.machinery.ledger import open_storage
from studies.machinery.study import Study

# What the libraries warn themselves of.
LIBRARIES = ("ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning",)


def pytest_configure(config):
    for line in LIBRARIES:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path}/ledger.db")


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
