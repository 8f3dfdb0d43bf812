"""The door: every mistake in a call is one line on stderr and status 2, with nothing begun."""

import subprocess
import sys

import pytest

from studies.machinery.cli import commands, main
from tests.conftest import ROOT
from tests.machinery.test_study import STUDY


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call the study's command line; return its status and what it said on stderr."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HDML_DATA", str(tmp_path / "data"))

    def called(*arguments, out=tmp_path / "runs"):
        status = main(STUDY, [*arguments, "--out", str(out)])
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
        ("MLFLOW_TRACKING_URI", "nonsense://host", "MLflow at nonsense://host can't be used"),
    ],
)
def test_a_wrong_address_is_told_before_anything_runs(call, monkeypatch, name, url, says):
    monkeypatch.setenv(name, url)
    status, said = call("--tiny")
    assert status == 2
    assert says in said


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
        (["confirm", "nothing", "--seeds", "1"], "--seeds must be >= 2 to give an interval, got 1"),
    ],
)
def test_confirm_knows_what_it_can_not_do(tmp_path, capsys, arguments, says):
    assert commands([*arguments, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
