"""What every test starts from: equal seeds and threads, no outside settings, the real data where they are."""

import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Databases and trackers for all tests, each started once and only where a test asks for it.
pytest_plugins = ("tests.services",)

ROOT = Path(__file__).resolve().parent.parent
SETTINGS_FROM_OUTSIDE = ("HDML_", "MLFLOW_", "RAY_")
# Where the real data are, how many faults to try, and the token of tests/isolated.py.
KEPT = ("HDML_SHARED", "HDML_FAULTS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")

# Two threads everywhere: the order of a sum, and so its last bit, follows the number of threads.
torch.set_num_threads(2)

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _outside_settings() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if name.startswith(SETTINGS_FROM_OUTSIDE) and name not in KEPT
    }


# The user's own ledger, tracker, cluster and data are none of the tests' business.
for _name in _outside_settings():
    del os.environ[_name]


@pytest.fixture(autouse=True)
def same_start():
    """Each test draws the same random numbers, alone or among others, and leaves no setting behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = _outside_settings()
    yield
    for name in _outside_settings().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images (`data/`) and weights (`weights/`); mark its tests `data`."""
    folder = Path(os.environ.get("HDML_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real images not found in {folder}: set HDML_SHARED to a folder with data/ and weights/")
    return folder
