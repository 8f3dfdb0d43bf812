"""The names, against the legend of the core and the lists of the plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.methods import METHODS
from hdml_core.notation import EpochReport, Hardness, HdmlLosses, RetrievalReport
from studies.machinery import records

QUALITY = RetrievalReport({1: 0.4, 2: 0.5}, 0.1, 0.2, 0.3, 0.01, 0.25, 0.02)


def report(epoch=1, steps=3, seconds=1.0):
    losses = dict.fromkeys(HdmlLosses._fields, 1.0)
    hardness = dict.fromkeys(Hardness._fields, 0.5)
    trace = {name: tuple(float(i) for i in range(steps)) for name in Hardness._fields}
    return EpochReport(epoch, epoch * steps, losses, hardness, trace, QUALITY, seconds)


def test_names_are_those_of_the_legend():
    assert set(records.LOSSES) == {name for method in METHODS.values() for name in method.losses._fields}
    assert set(records.HARDNESS_TRACE) == set(Hardness._fields)


def test_metrics_are_split_slash_name():
    assert set(records.training_metrics(report())) == {f"train/{name}" for name in HdmlLosses._fields}
    assert records.retrieval_metrics("validation", QUALITY) == {
        "validation/recall_at_1": 0.4,
        "validation/recall_at_2": 0.5,
        "validation/map_at_r": 0.1,
        "validation/r_precision": 0.2,
        "validation/nmi": 0.3,
        "validation/nmi_std": 0.01,
        "validation/f1": 0.25,
        "validation/f1_std": 0.02,
    }


@given(steps=st.integers(1, 5000), epochs=st.integers(1, 4))
def test_a_trace_is_thinned_over_the_whole_trial(steps, epochs):
    several = [records.hardness_trace(report(epoch, steps), epochs) for epoch in range(1, epochs + 1)]
    points = [point for trace in several for point in trace["hardness/kept"]]
    taken = [step for step, _ in points]
    assert taken == sorted(set(taken))
    assert min(steps * epochs, records.TRACE_POINTS) / 2 <= len(points) <= records.TRACE_POINTS
    assert all(value == (step - 1) % steps for step, value in points)


@pytest.mark.parametrize("state", ["RUNNING", *records.FINISHED])
def test_every_state_has_a_status(state):
    assert records.RUN_STATUS[state] in ("FINISHED", "FAILED", "KILLED")
