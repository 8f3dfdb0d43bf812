"""Curves and arms, from an MLflow database to numbers."""

from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from dashboards import DashboardError
from dashboards.curves import Curve, Dots, found, over_epochs, parts
from tests.dashboards.conftest import ABLATION, ALPHAS


def expected(values):
    half_width = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return pytest.approx(fmean(values)), pytest.approx(half_width), len(values)


def test_a_part_counts_at_its_last_epoch(tracker):
    runs = tracker.study("alpha").runs
    by_alpha = ALPHAS["hdml_npair"]
    trial = next(run for run in runs if run.arm == "hdml_npair" and run.params["hdml.alpha"] == "1.0")
    assert parts(tracker, trial) == list(by_alpha[1.0])
    assert fmean(parts(tracker, trial)) == pytest.approx(trial.metrics["validation/recall_at_1"])


def test_a_curve_has_a_line_for_each_arm_and_levels_for_what_does_not_hang_on_the_setting(tracker):
    curve = found(tracker, "alpha")
    assert isinstance(curve, Curve)
    assert curve.title == "How does retrieval depend on alpha?"
    assert curve.setting == "hdml.alpha"
    for line, by_alpha in zip(curve.lines, ALPHAS.values(), strict=True):
        assert line.points == tuple((alpha, expected(values)) for alpha, values in by_alpha.items())
    assert [(line.name, line.best[0]) for line in curve.lines] == [("HDML (N-pair)", 1.0), ("HDML (triplet)", 100.0)]
    triplet, baseline = curve.levels
    assert (triplet.name, triplet.goal) == ("Triplet", expected((0.46, 0.47, 0.48, 0.49)))
    assert (baseline.name, baseline.goal) == ("baseline", expected((0.50, 0.51, 0.52, 0.49)))
    assert curve.table().rows[1] == ["HDML (N-pair)", "1", "55.50", "2.05", "4", "best"]


def test_a_single_part_has_no_interval(tracker):
    (line,) = found(tracker, "single").lines
    assert line.points == ((16.0, (0.4, None, 1)), (64.0, (0.5, None, 1)))


def test_arms_are_compared_with_the_first_part_by_part(tracker):
    dots = found(tracker, "ablation")
    assert isinstance(dots, Dots)
    assert [dot.name for dot in dots.dots] == ["trained", "frozen", "without J_soft"]
    first, *others = ABLATION
    for dot, values in zip(dots.dots, ABLATION.values(), strict=True):
        assert dot.goal == expected(values)
    assert dots.dots[0].difference is None
    for dot, arm in zip(dots.dots[1:], others, strict=True):
        assert dot.difference == expected(np.subtract(ABLATION[arm], ABLATION[first]))


def test_over_epochs_each_arm_shows_how_its_best_trial_got_on(tracker):
    curve = over_epochs(tracker, "alpha")
    assert curve.setting == "epoch"
    npair = curve.lines[0]
    # The fixture's epochs come closer and closer to what each part reached at alpha = 1.
    wanted = [[value - far for value in ALPHAS["hdml_npair"][1.0]] for far in (0.2, 0.1, 0.0)]
    assert npair.points == tuple((float(epoch), expected(values)) for epoch, values in enumerate(wanted, 1))
    assert [line.name for line in curve.lines] == ["HDML (N-pair)", "HDML (triplet)", "Triplet"]


def test_arms_are_shown_on_test_classes_once_these_were_opened(tracker):
    dots = found(tracker, "opened")
    assert (dots.goal, dots.reading) == ("Recall@1 on test classes", "95 % t-intervals over seeds")
    assert [dot.goal.n for dot in dots.dots] == [2, 2]
    assert dots.dots[1].difference.mean == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("study", "complaint"),
    [
        ("two", r"study 'two' searches \[hdml.alpha, optim.lr_embedder\]: python -m studies show two"),
        ("empty", "study 'empty' must have a trial that is COMPLETE, got none: run it"),
        ("alpah", "unknown study 'alpah': .* did you mean 'alpha'"),
    ],
)
def test_what_can_not_be_drawn_is_refused(tracker, study, complaint):
    with pytest.raises(DashboardError, match=complaint):
        found(tracker, study)
