"""The ledger under a real Ray Tune: pruned rows are PRUNED, failed ones FAIL, and each end is told once."""

import optuna
import pytest

from studies.machinery.ledger import spent
from tests.machinery.toy_study import run_toy
from tests.machinery.toys import EPOCHS

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


def test_all_trials_end_and_the_published_point_was_first(tmp_path):
    ledger = run_toy(tmp_path, 6)
    rows = ledger.rows()
    assert [row.number for row in rows] == list(range(6))
    assert rows[0].params == {"x": 0.3}
    assert ledger.best().number == 0
    for row in rows:
        assert row.state == "COMPLETE"
        assert row.value == pytest.approx(1 - (row.params["x"] - 0.3) ** 2)
        assert list(row.reports) == [1, 2, 3, 4, 5]
        assert row.notes["metrics"]["train/j_m"] == 1 / EPOCHS
        assert row.notes["attempts"] == 1

    assert [row.number for row in run_toy(tmp_path, 6).rows()] == list(range(6))
    assert [row.number for row in run_toy(tmp_path, 8).rows()] == list(range(8))


def test_pruning_acts_and_is_told(tmp_path):
    rows = run_toy(tmp_path, 14, pruner="median", parallel=1).rows()
    pruned = [row for row in rows if row.state == "PRUNED"]
    assert pruned
    assert all(row.state in ("PRUNED", "COMPLETE") for row in rows)
    for row in pruned:
        steps = list(row.reports)
        assert 2 <= len(steps) < EPOCHS
        assert steps == list(range(1, len(steps) + 1))
        # The median pruner's own rule, on what was known when the trial ran.
        before = sorted(other.reports[steps[-1]] for other in rows[: row.number] if other.state == "COMPLETE")
        assert row.reports[steps[-1]] <= before[len(before) // 2]


def test_a_trial_that_raises_fails_with_its_reason_and_the_study_goes_on(tmp_path):
    rows = run_toy(tmp_path, 4, diverges_above=0.5).rows()
    assert len(rows) == 4
    for row in rows:
        failed = row.params["x"] > 0.5
        assert row.state == ("FAIL" if failed else "COMPLETE")
        assert row.notes.get("reason") == ("Diverged: j_m is nan at epoch 1" if failed else None)
    assert {row.state for row in rows} == {"FAIL", "COMPLETE"}


def test_no_trial_begins_after_the_hours_are_over(tmp_path):
    ledger = run_toy(tmp_path, 6, hours=1e-9)
    assert ledger.rows() == []
    assert len(run_toy(tmp_path, 2).rows()) == 2


def test_a_study_stops_by_itself_once_its_gpu_hours_are_spent(tmp_path):
    # A toy says that it takes half a second of a GPU.
    rows = run_toy(tmp_path, 20, parallel=1, gpu_hours=1.4 / 3600).rows()
    assert [row.state for row in rows] == ["COMPLETE"] * 3
    assert spent(rows) == (pytest.approx(1.5), pytest.approx(1.5))
    assert len(run_toy(tmp_path, 20, parallel=1, gpu_hours=1.9 / 3600).rows()) == 4


def test_checkpoints_stay_under_the_cap_those_of_the_best_and_the_newest_last(tmp_path):
    ledger = run_toy(tmp_path, 6, parallel=1, disk_gb=40e-9)
    kept = {folder.name for folder in (tmp_path / "toy").glob("0*")}
    assert kept == {"0000", "0005"}
    assert ledger.best().number == 0


def test_the_ledger_is_a_plain_optuna_study(tmp_path):
    run_toy(tmp_path, 3)
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path}/ledger.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
