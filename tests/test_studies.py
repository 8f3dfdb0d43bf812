"""Every study file: it says what it asks, it is data, and it runs."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections import Counter

import mlflow
import numpy as np
import pytest

from hdml_core.datasets import cars196, cub200, sop
from hdml_core.methods import METHODS
from hdml_core.metric_losses import build_metric_loss
from hdml_core.sampling import RoleBatches
from studies.machinery import records
from studies.machinery.ledger import existing
from studies.machinery.samplers import grid
from studies.machinery.storage import open_storage
from studies.machinery.study import TINY_TRIALS, Study, variant
from studies.machinery.tables import ROWS
from tests.conftest import ROOT

FILES = sorted(file for file in (ROOT / "studies").glob("*.py") if not file.name.startswith("__"))
NAMES = [file.stem for file in FILES]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def run(name, out, data, *arguments):
    """Run a study as a user does; return what it said on the terminal."""
    environment = {**os.environ, "HDML_DATA": str(data)}
    command = [sys.executable, f"studies/{name}.py", "--tiny", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_study_is_data(file):
    module = importlib.import_module(f"studies.{file.stem}")
    text = file.read_text()
    assert isinstance(module.STUDY, Study)
    assert module.STUDY.name == file.stem
    assert module.STUDY.question == module.__doc__
    assert module.__doc__.split("\n")[0].endswith("?")
    assert "CVPR 2019" in module.__doc__
    for part in ("\nRun: ", f"python studies/{file.name}", "\nLook: "):
        assert part in module.__doc__
    assert text.count("\n") < 60
    for library in ("ray", "optuna", "mlflow", "torch"):
        assert f"import {library}" not in text
        assert f"from {library}" not in text


@pytest.mark.cluster
@pytest.mark.parametrize("name", [name for name in NAMES if name != "alpha_beta"])
def test_a_study_runs_tiny(name, tmp_path, data):
    said = run(name, tmp_path, data)
    study = variant(importlib.import_module(f"studies.{name}").STUDY, tiny=True)
    assert f"{study.trials} of {study.trials} trials" in said
    lines = {line.split("  ")[0] for line in said.split("\n")}
    assert study.arms.keys() <= lines
    if study.test_seeds:
        opened = [line for line in lines if line.startswith("paper mode: ") and "test classes" not in line]
        assert len(opened) == len(study.arms) + len(study.rivals)
        assert f"over {study.test_seeds} seeds" in said


def test_every_row_of_the_published_tables_is_a_method():
    with (ROOT / "dashboards/published.csv").open() as file:
        published = {(row["dataset"], row["method"]) for row in csv.DictReader(file)}
    for dataset in ("cub200", "cars196", "sop"):
        study = importlib.import_module(f"studies.table_{dataset}").STUDY
        assert {method for of, method in published if of == dataset} == study.arms.keys() == ROWS.keys()
        assert study.config().data.name == dataset
        assert study.trials % len(study.arms) == 0


@pytest.mark.parametrize(
    ("name", "counts"), [("cub200", cub200.EXPECTED), ("cars196", cars196.EXPECTED), ("sop", sop.EXPECTED)]
)
def test_every_row_of_a_table_finds_classes_enough_in_every_fold(name, counts):
    for config in importlib.import_module(f"studies.table_{name}").STUDY.configs().values():
        for fold in range(config.data.folds):
            classes = counts.train_classes - len(range(fold, counts.train_classes, config.data.folds))
            labels = np.repeat(np.arange(classes), 2)
            layout = build_metric_loss(config.loss, classes, 8).layout
            assert RoleBatches(labels, layout, config.data.batch_size, 1, 0).tuples > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_tried_to_its_end(name):
    study = importlib.import_module(f"studies.{name}").STUDY
    if study.sampler == "grid":
        assert study.trials == len(grid(study.search_space))


@pytest.mark.cluster
def test_alpha_beta_from_start_to_extension(tmp_path, data):
    said = run("alpha_beta", tmp_path, data)
    for part in ("baseline", "published point", "best", "mlflow ui --backend-store-uri", "-m studies confirm"):
        assert part in said

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("alpha_beta-tiny").experiment_id
    parent, children = family(client, experiment)
    check_parent(parent)
    assert sorted(children) == [("baseline", "0000"), *(("search", f"{number:04d}") for number in range(TINY_TRIALS))]
    for child in children.values():
        check_child(client, child, parent)
    rows = check_ledger(tmp_path, children, TINY_TRIALS)
    assert rows[0].params == {"hdml.alpha": 90.0, "hdml.beta": 1e4}

    # The same command again has nothing to do.
    assert table(run("alpha_beta", tmp_path, data)) == table(said)
    assert check_ledger(tmp_path, family(client, experiment)[1], TINY_TRIALS) == rows

    # A larger budget extends it.
    run("alpha_beta", tmp_path, data, "--trials", str(TINY_TRIALS + 2))
    parent, children = family(client, experiment)
    check_parent(parent)
    assert check_ledger(tmp_path, children, TINY_TRIALS + 2)[:TINY_TRIALS] == rows

    # The test classes open once.
    confirm = [sys.executable, "-m", "studies", "confirm", "alpha_beta-tiny", "--seeds", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "HDML_DATA": str(data)}
    first, second = (
        subprocess.run(confirm, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    )
    assert (first.returncode, second.returncode) == (0, 2), first.stderr
    assert "--again" in second.stderr
    written = json.loads((tmp_path / "alpha_beta-tiny" / "confirm.json").read_text())
    assert set(written["results"]["recall_at_1"]) == {"best", "baseline", "difference"}


def table(said):
    """What a study says after the lines of its trials."""
    lines = said.rstrip().split("\n")
    return lines[lines.index("") :]


def family(client, experiment):
    """The parent run of a study, and its children by kind and trial."""
    runs = client.search_runs([experiment])
    children = {
        (run.data.tags[records.TAG_KIND], run.data.tags[records.TAG_TRIAL]): run
        for run in runs
        if "mlflow.parentRunId" in run.data.tags
    }
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(children) == len(runs) - 1
    return parent, children


def check_parent(parent):
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"] == importlib.import_module("studies.alpha_beta").__doc__
    assert {records.TAG_COMMIT, records.TAG_DATA, records.TAG_RECIPE} <= parent.data.tags.keys()


def check_child(client, child, parent):
    tags, names = child.data.tags, set(child.data.metrics)
    assert child.info.status == "FINISHED"
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert tags[records.TAG_STATE] in ("COMPLETE", "PRUNED")
    assert (tags[records.TAG_DEVICE], tags[records.TAG_RECIPE]) == ("cpu", "paper")
    assert {records.TAG_COMMIT, records.TAG_DATA, records.TAG_IMAGE_SIDE, records.TAG_HOST} <= tags.keys()
    assert child.data.params["optim.epochs"] == "3"
    plain = tags[records.TAG_KIND] == "baseline"
    assert child.data.params["synthesis"] == ("none" if plain else "hdml")

    losses = METHODS["none" if plain else "hdml"].losses._fields
    wanted = {f"train/{name}" for name in losses} | {f"validation/{name}" for name in records.QUALITIES}
    wanted |= set() if plain else {f"hardness/{name}" for name in records.HARDNESS_TRACE}
    wanted |= {"cost/seconds", "cost/gpu_seconds", "cost/peak_memory_mb"}
    assert wanted <= names
    assert not {name for name in names if name.startswith("test/")}
    for name in wanted:
        steps = [point.step for point in client.get_metric_history(child.info.run_id, name)]
        assert len(steps) == len(set(steps))


def check_ledger(out, children, trials):
    """The ledger has as many trials as were asked for, all ended, each with the run that the tracker has."""
    rows = existing(open_storage(f"sqlite:///{out}/ledger.db"), "alpha_beta-tiny").rows()
    assert [row.number for row in rows] == list(range(trials))
    assert Counter(row.state for row in rows).keys() <= {"COMPLETE", "PRUNED"}
    for row in rows:
        run = children["search", f"{row.number:04d}"]
        # A trial that ends before MLflow has made its run has no note of it.
        assert row.notes.get("mlflow_run", run.info.run_id) == run.info.run_id
        assert run.data.tags[records.TAG_STATE] == row.state
        assert float(run.data.params["hdml.alpha"]) == row.params["hdml.alpha"]
    assert any("mlflow_run" in row.notes for row in rows)
    return rows
