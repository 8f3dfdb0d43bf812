"""Run a table's study on a small archive in the official layout: `python -m tests.datasets.small_tables DATASET ARGS`.

Only the counts that the archives are checked against are others, in the driver and in its workers.
"""

import importlib
import sys
from functools import partial

from hdml_core.datasets import DATASETS, cars196, sop
from hdml_core.datasets.base import Counts
from studies.machinery import confirm, driver
from studies.machinery.cli import main
from studies.machinery.trial import run_job

CLASSES, PER_CLASS = 40, 26
"""Enough for Recall@100 in one of five validation folds."""
SMALL = Counts(CLASSES * PER_CLASS, CLASSES, CLASSES * PER_CLASS // 2, CLASSES // 2)


def expect_little():
    DATASETS.update(cars196=partial(cars196.read, expected=SMALL), sop=partial(sop.read, expected=SMALL))


def run_small_job(config):
    expect_little()
    run_job(config)


if __name__ == "__main__":
    from tests.datasets import small_tables  # of __main__ a worker would get a copy, tables and all

    expect_little()
    driver.execute = confirm.execute = partial(driver.execute, run=small_tables.run_small_job)
    dataset, *arguments = sys.argv[1:]
    raise SystemExit(main(importlib.import_module(f"studies.table_{dataset}").STUDY, arguments))
