"""The end of a study on the terminal: what was found, what it cost, where to look."""

import pytest

from studies.machinery.ledger import METRICS, PRICE, SPENT
from studies.machinery.progress import summary
from studies.machinery.records import GPU_SECONDS, QUALITIES, SECONDS
from studies.machinery.space import Choice, LogUniform
from studies.machinery.study import Study

STUDY = Study(
    "study",
    "Why?",
    {"synthesis": Choice(("none", "hdml")), "hdml.alpha": LogUniform(0.1, 300.0, when={"synthesis": "hdml"})},
    baseline={"synthesis": "none"},
    goals={"validation/recall_at_1": "maximize", "cost/gpu_seconds": "minimize"},
    trials=3,
)


def tried(ledger, point, recall, seconds):
    ledger.enqueue([point])
    number = ledger.next(9).number
    ledger.note_of(number, SPENT, {SECONDS: 2 * seconds, GPU_SECONDS: seconds})
    metrics = {f"validation/{quality}": recall for quality in QUALITIES}
    ledger.end(number, "COMPLETE", [recall, seconds], **{METRICS: metrics})


@pytest.fixture
def said(begin, tmp_path):
    directions = list(STUDY.goals.values())
    search = begin("study", STUDY.space, directions=directions)
    search.note(PRICE, 3.6)
    tried(search, {"synthesis": "hdml", "hdml.alpha": 90.0}, 0.50, 900.0)
    tried(search, {"synthesis": "none"}, 0.45, 450.0)
    tried(search, {"synthesis": "hdml", "hdml.alpha": 1.0}, 0.40, 900.0)
    baseline = begin("study.baseline", {}, directions=directions)
    tried(baseline, {}, 0.40, 450.0)
    return summary(STUDY, {"baseline": baseline, "search": begin("study", STUDY.space)}, "http://host", tmp_path)


def test_settings_that_a_trial_does_not_have_stay_empty(said):
    lines = {line[:16].rstrip(): line[16:].split() for line in said.split("\n")}
    assert lines["baseline"] == [*["0.4000"] * 4, "COMPLETE"]
    assert lines["best"] == lines["published point"] == ["0000", "hdml", "90", *["0.5000"] * 4, "COMPLETE"]


def test_of_several_goals_the_front_is_named(said):
    assert "\nPareto front: 0000, 0001\n" in said


def test_what_was_spent_is_told_in_all_for_a_trial_and_for_a_point_gained(said):
    # 5,400 s of work at 3.6 an hour, four trials, and ten points above the baseline.
    assert (
        "\nspent: in all 1.500 h of work, 0.750 GPU-h, cost 5.40; "
        "each trial 0.375 h of work, 0.188 GPU-h, cost 1.35; "
        "each point gained 0.150 h of work, 0.075 GPU-h, cost 0.54\n"
    ) in said


def test_of_several_arms_the_best_trial_of_each_is_told_with_what_it_drew(begin, tmp_path):
    study = Study(
        "arms",
        "Which?",
        {"hdml.alpha": LogUniform(0.1, 300.0)},
        arms={"hdml": {}, "npair": {"synthesis": "none"}},
        trials=4,
        test_seeds=2,
    )
    search = begin("arms", study.search_space)
    for recall, point in [
        (0.4, {"arm": "hdml", "hdml.alpha": 90.0}),
        (0.6, {"arm": "hdml", "hdml.alpha": 1.0}),
        (0.5, {"arm": "npair"}),
    ]:
        search.enqueue([point])
        metrics = {f"validation/{quality}": recall for quality in QUALITIES}
        search.end(search.next(9).number, "COMPLETE", [recall], **{METRICS: metrics})
    said = summary(study, {"search": search}, "http://host", tmp_path)
    lines = {line.split("  ")[0]: line.split() for line in said.split("\n")}
    assert lines["hdml"] == ["hdml", "0001", "alpha=1", *["0.6000"] * 4, "COMPLETE"]
    assert lines["npair"] == ["npair", "0002", *["0.5000"] * 4, "COMPLETE"]
    assert "published point" not in said
    assert "studies confirm" not in said
