"""Faults put into real studies: drivers, workers, nodes, databases, trackers and disks that go, at every seam.

Every study here is of toys, but Ray, Optuna, PostgreSQL and MLflow are real. After each fault the same command goes
on, and `invariants.settled` must hold. `HDML_FAULTS=all` tries every fault at every seam, each in a study of its own,
and kills 200 drivers at random; without it a part of them is tried.
"""

import os

ALL = os.environ.get("HDML_FAULTS") == "all"


def chosen(everything, part):
    """What is tried of a list: all of it, or the part that every run has time for."""
    return everything if ALL else part
