"""Faults put into real studies: drivers, workers, nodes, databases, trackers and disks that go, at every seam.

Every study here is of toys, but Ray, Optuna, PostgreSQL and MLflow are real. After each fault the same command goes
on, and `invariants.settled` must hold. `HDML_FAULTS=all` tries every seam in a study of its own and kills 200 drivers
at random; without it several faults share a study.
"""
