"""A data set's table, from an MLflow database to Markdown, LaTeX and CSV; its numbers are those of scipy."""

import csv
from io import StringIO
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from dashboards import DashboardError
from dashboards.comparison import compare
from dashboards.document import latex, markdown
from dashboards.runs import Tracker
from dashboards.table import CSV_HEAD, as_csv, page
from tests.dashboards.conftest import HDML, NPAIR, PAPER_NPAIR, SEEDS, TRIPLET
from tests.dashboards.test_document import balanced


@pytest.fixture(scope="module")
def comparison(tracker):
    return compare(tracker, "cub200", ["table_cub200", "large", "alike"])


@pytest.fixture(scope="module")
def said(comparison):
    return markdown(page(comparison))


def line(said, *starts):
    """The cells of the first line that begins with these."""
    for text in said.splitlines():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if cells[: len(starts)] == [*starts]:
            return cells
    raise AssertionError(f"no line begins with {starts}")


def arm(comparison, study, method):
    return next(arm for arm in comparison.arms if (arm.study, arm.method) == (study, method))


def half_width(values):
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def test_honest_numbers_are_those_of_the_newest_opening_alone(comparison):
    npair = arm(comparison, "table_cub200", "npair")
    assert npair.opening == "paper-2"
    assert npair.values("recall_at_1") == dict(zip(SEEDS, NPAIR, strict=True))
    found = npair.honest("recall_at_1")
    assert found == (pytest.approx(fmean(NPAIR)), pytest.approx(half_width(NPAIR)), 3)
    assert npair.paper_mode("recall_at_1") == pytest.approx(fmean(PAPER_NPAIR))


def test_they_stand_beside_the_published_ones(said):
    assert line(said, "N-pair", "published")[2:] == ["60.2", "28.2", "51.9", "64.3", "74.9", "83.2", ""]
    assert line(said, "", "table_cub200 †")[4] == f"22.60 ± {100 * half_width(TRIPLET):.2f}"
    assert line(said, "Contrastive", "published")[2:5] == ["47.2?", "12.5?", "27.2"]
    assert "? published, but unconfirmed" in said
    assert line(said, "Multi-similarity", "large ‡")[2:] == ["75.00", "27.50", "55.00", "65.00", "75.00", "85.00", "1"]
    assert line(said, "Frozen features alone", "table_cub200 †")[4] == "24.78"


def test_a_difference_is_paired_by_seed_and_stands_beside_the_published_one(comparison, said):
    differences = np.subtract(HDML, NPAIR)
    gain = comparison.difference(arm(comparison, "table_cub200", "hdml_npair"))
    assert gain.ours == (pytest.approx(fmean(differences)), pytest.approx(half_width(differences)), 3)
    wanted = f"+{100 * fmean(differences):.2f} ± {100 * half_width(differences):.2f}"
    assert line(said, "HDML (N-pair) − N-pair", "table_cub200 †")[2:] == [wanted, "3", "+1.8"]


def test_rows_of_unlike_protocol_have_unlike_marks(said):
    assert (
        "† mobilenet_v2 frozen, 512-d, 128 of 128 px, data digest 1a2b3c4d; not comparable with the published" in said
    )
    assert "‡ googlenet trained end to end, 512-d, 227 of 256 px, images of 375 px, data digest ffffffff" in said
    assert "settings as published, but nothing tells whether the images are" in said
    assert "alike †" in said
    assert "large ‡" in said


def test_unlike_protocols_are_marked_in_differences_too(tracker):
    said = markdown(page(compare(tracker, "omniglot")))
    assert line(said, "HDML (N-pair) − N-pair")[1] == "table_omniglot ‡ − †"
    assert "mobilenet_v2 frozen up to block4" in said
    assert "published rows" not in said


def test_costs_are_of_tuning_and_final_trainings(comparison, said):
    # Two trials of 360 and 720 s, one of 36 s that was pruned, three trainings of 36 s.
    npair = arm(comparison, "table_cub200", "npair")
    assert (npair.tuned, npair.gpu_hours, npair.cpu_hours) == (3, 0, pytest.approx(1224 / 3600))
    ids = " ".join(run.run_id[:8] for run in npair.trainings.values())
    assert line(said, "N-pair", "table_cub200 †", ids)[3:] == ["3", "0.34 CPU h"]
    large = arm(comparison, "large", "npair")
    assert (large.gpu_hours, large.cpu_hours) == (pytest.approx(2.0), 0)


def test_what_did_not_end_is_left_out_and_said(comparison, said):
    assert arm(comparison, "table_cub200", "triplet").honest("nmi").n == 2
    assert "Left out: table_cub200, Triplet, seed 12002, FAIL, J_m is not finite." in said


def test_csv_has_every_number_and_every_run(comparison):
    rows = list(csv.DictReader(StringIO(as_csv(comparison))))
    assert tuple(rows[0]) == CSV_HEAD
    assert len(rows) == 6 * ((11 - 4) + (4 + 2 + 1))
    found = next(
        row
        for row in rows
        if (row["study"], row["method"], row["metric"]) == ("table_cub200", "hdml_npair", "recall_at_1")
    )
    assert float(found["published_percent"]) == 53.7
    assert found["published_status"] == "confirmed"
    assert float(found["honest_percent"]) == pytest.approx(100 * fmean(HDML), abs=1e-4)
    assert float(found["difference_percent"]) == pytest.approx(100 * fmean(np.subtract(HDML, NPAIR)), abs=1e-4)
    assert (found["rival"], found["published_difference"], found["difference_seeds"]) == ("npair", "1.8", "3")
    assert found["run_ids"].split() == [
        run.run_id for run in arm(comparison, "table_cub200", "hdml_npair").trainings.values()
    ]


def test_latex_is_whole(comparison):
    text = latex(page(comparison))
    assert balanced(text)
    assert text.isascii()


@pytest.mark.parametrize(
    ("dataset", "named", "complaint"),
    [
        ("cub20", [], "unknown data set 'cub20': published or in MLflow are .*cub200.*; did you mean 'cub200'"),
        ("cars196", [], "unknown study 'table_cars196': .* has .*table_cub200"),
        ("cub200", ["larg"], "unknown study 'larg': .*; did you mean 'large'"),
        ("cub200", ["unopened"], "'unopened' must have opened its test classes, .*: run it to the end"),
        ("cub200", ["table_omniglot"], "'table_omniglot' must be of cub200, got omniglot: python -m dashboards table"),
        ("cub200", ["unnamed"], "the trainings of study 'unnamed' name none: python -m studies show unnamed"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(tracker, dataset, named, complaint):
    with pytest.raises(DashboardError, match=complaint) as caught:
        compare(tracker, dataset, named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("sqlite:///nowhere/mlflow.db", "must be there, got sqlite:///nowhere/mlflow.db: run a study first"),
        ("http://user:secret@127.0.0.1:1", r"MLflow at http://user:\*\*\*@127.0.0.1:1 can't be read: "),
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/mlflow",
            r"MLflow at .*:\*\*\*@127.0.0.1:1/mlflow can't be read: ",
        ),
    ],
)
def test_a_tracker_that_is_not_there_is_told_in_a_line(uri, complaint):
    with pytest.raises(DashboardError, match=complaint) as caught:
        Tracker(uri).study("study")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
