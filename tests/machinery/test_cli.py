"""The door: every mistake in a call is one line on stderr and status 2, with nothing begun."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from hdml_core.datasets import data_root
from studies.machinery.cli import commands, main
from studies.machinery.driver import prepare, terms
from studies.machinery.lease import Lease
from studies.machinery.ledger import Ledger
from studies.machinery.space import LogUniform
from studies.machinery.storage import open_storage
from studies.machinery.study import variant
from tests.conftest import ROOT
from tests.machinery.test_study import STUDY

COMMANDS = ("show", "sync", "verify")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data root, for the glyphs to be drawn once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def call(tmp_path, data, monkeypatch, capsys):
    """Call the study's command line; return its status and what it said on stderr."""
    monkeypatch.setenv("HDML_DATA", str(data))

    def called(*arguments, out=tmp_path / "runs", study=STUDY):
        status = main(study, [*arguments, "--out", str(out)])
        return status, capsys.readouterr().err

    return called


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], "trials of study 'question' must be >= 1, got 0"),
        (["--hours", "-1"], "hours of study 'question' must be > 0, got -1.0"),
        (["--set", "hdml.alhpa=7"], "unknown setting 'hdml.alhpa'"),
        (["--set", "hdml.beta"], "a setting must be written dotted.name=value"),
        (["--set", "optim.epochs=many"], "optim.epochs must be of type int, got 'many'"),
        (["--set", "hdml.alpha=7"], "hdml.alpha is what study 'question' searches"),
        (["--set", "study.pruner=asha"], "study.pruner must be one of median, halving, hyperband, wilcoxon, none"),
        (["--set", "study.fold=2"], "unknown setting 'study.fold': a study has [trials, folds, "),
        (["--set", "study.folds=9"], "folds of study 'question' must be at most data.folds = 5, got 9"),
        (["--tiny", "--dataset", "cub200"], "--tiny is a toy size of glyphs"),
        (["--dataset", "cars196"], "car_ims.tgz"),
        (["--dataset", "features"], "data.path"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, tmp_path, arguments, says):
    status, said = call(*arguments)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
    assert not (tmp_path / "runs" / "ledger.db").exists()


def test_a_study_file_ends_with_the_same_status_and_line(tmp_path):
    command = [sys.executable, "studies/alpha_beta.py", "--dataset", "cub2000", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.name must be one of 'glyphs', ")
    assert done.stderr.endswith("got 'cub2000'\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "url", "says"),
    [
        ("HDML_LEDGER", "nonsense", "the ledger nonsense can't be opened"),
        ("HDML_LEDGER", "postgresql+psycopg://me:secret@127.0.0.1:9/x", "me:***@127.0.0.1:9/x can't be opened: "),
        ("MLFLOW_TRACKING_URI", "nonsense://host", "MLflow at nonsense://host can't be used"),
    ],
)
def test_a_wrong_address_is_told_before_anything_runs(call, monkeypatch, name, url, says):
    monkeypatch.setenv(name, url)
    status, said = call("--tiny")
    assert status == 2
    assert says in said
    assert "secret" not in said


def test_a_study_begun_on_other_terms_is_refused_with_the_difference(call, tmp_path):
    began = variant(STUDY, tiny=True, overrides={"optim.epochs": 2})
    storage = open_storage(f"sqlite:///{tmp_path}/runs/ledger.db")
    dataset = prepare(began.config(), data_root())
    with Lease(storage.engine, began.name) as lease:
        Ledger(storage, began.name, began.space, lease).settle(terms(began, dataset), began.space)
    status, said = call("--tiny")
    assert status == 2
    assert "was begun on other terms: optim.epochs was 2, is 3. Give --name OTHER" in said

    narrower = replace(STUDY, space={"hdml.alpha": LogUniform(1.0, 2.0)})
    status, said = call("--tiny", "--set", "optim.epochs=2", study=narrower)
    assert status == 2
    assert "the space, which is not a widening of the old one" in said


def test_a_second_driver_is_refused_and_told_of_the_first(call, tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/runs/ledger.db")
    with Lease(storage.engine, "question-tiny"):
        status, said = call("--tiny")
    assert status == 2
    assert f"study 'question-tiny' is at work already: process {os.getpid()} on " in said
    assert "--join" in said


def test_an_output_folder_that_can_not_be_written_is_told(call):
    status, said = call("--tiny", out="/proc/nowhere")
    assert status == 2
    assert "the output folder /proc/nowhere can't be written" in said


def test_help_is_the_study_s_question(capsys):
    with pytest.raises(SystemExit) as left:
        main(STUDY, ["--help"])
    assert left.value.code == 0
    assert "Why?" in capsys.readouterr().out


def test_an_unknown_option_is_status_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(STUDY, ["--trails", "3"])
    assert left.value.code == 2
    assert "--trails" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["confirm", "nothing"], "no study 'nothing' in the ledger: it has []"),
        (["confirm", "nothing", "--seeds", "1"], "--seeds must be in [2, 1000], for an interval needs two, got 1"),
        *(
            ([command, "nothing"], "no study 'nothing' in the ledger: it has []")
            for command in ("show", "sync", "verify")
        ),
    ],
)
def test_a_command_knows_what_it_can_not_do(tmp_path, capsys, arguments, says):
    assert commands([*arguments, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
