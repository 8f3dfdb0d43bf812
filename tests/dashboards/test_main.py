"""The command line: what it prints, writes and refuses."""

import subprocess
import sys

import pytest

from dashboards.__main__ import DONE, MISTAKE, main
from tests.conftest import ROOT


def test_a_table_is_printed_and_written(store, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["table", "cub200", "--runs", str(store.runs), "--out", str(out)]) == DONE
    said = capsys.readouterr().out
    assert (out / "table_cub200.md").read_text() in said
    assert sorted(path.name for path in out.iterdir()) == ["table_cub200.csv", "table_cub200.md", "table_cub200.tex"]
    assert str(out / "table_cub200.tex") in said


def test_a_figure_is_drawn_and_its_numbers_printed(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["figure", "alpha", "--out", str(tmp_path)]) == DONE
    assert "| HDML (N-pair)  |          1 | 55.50 |       2.05 |   4 | best |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure_alpha.png", "figure_alpha.svg"]


def test_a_figure_over_epochs_has_a_name_of_its_own(store, tmp_path, capsys):
    assert main(["figure", "ablation", "--over", "epoch", "--runs", str(store.runs), "--out", str(tmp_path)]) == DONE
    assert "| trained        |     3 | 52.00 |" in capsys.readouterr().out
    assert (tmp_path / "figure_ablation_epoch.png").is_file()


@pytest.mark.parametrize("arguments", [["table", "cub20"], ["table", "sop", "--study", "alpha"], ["figure", "nothing"]])
def test_a_mistake_is_a_line(store, tmp_path, capsys, arguments):
    assert main([*arguments, "--runs", str(store.runs), "--out", str(tmp_path)]) == MISTAKE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_database_is_made_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HDML_OUT", str(tmp_path))
    assert main(["table", "cub200"]) == MISTAKE
    assert "run a study first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_refused(store, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["figure", "alpha", "--runs", str(store.runs), "--out", str(tmp_path / "file")]) == MISTAKE
    assert "--out must be a folder" in capsys.readouterr().err


def test_help_is_told_without_mlflow():
    script = "import sys; sys.modules['mlflow'] = None; from dashboards.__main__ import main; main(['--help'])"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False).returncode == 0
