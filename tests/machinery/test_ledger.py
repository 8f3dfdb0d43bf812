"""The laws of the ledger: every step once, every end once and true, nothing lost when a driver goes."""

import sqlite3
import time
from contextlib import ExitStack

import pytest
from sqlalchemy.exc import OperationalError

from studies.machinery import lease as leases
from studies.machinery import ledger as ledgers
from studies.machinery.lease import Lease, LeaseLostError
from studies.machinery.ledger import (
    ATTEMPTS,
    CRASHES,
    METRICS,
    REASON,
    SPENT,
    Ledger,
    best_points,
    existing,
    set_aside,
    spent,
)
from studies.machinery.records import GPU_SECONDS, SECONDS
from studies.machinery.samplers import PRUNERS, SAMPLERS
from studies.machinery.space import LogUniform, Uniform, to_json
from studies.machinery.storage import LedgerError, open_storage

SPACE = {"hdml.alpha": LogUniform(0.1, 300.0), "hdml.beta": LogUniform(0.1, 1e5)}


def terms(space=SPACE, **settings):
    return {
        "settings": settings,
        "baseline": None,
        "goals": {"g": "maximize"},
        "folds": 1,
        "seeds": 1,
        "limits": {},
        "steps": "epochs",
        "data": "0",
        "space": to_json(space),
    }


@pytest.fixture
def ledger(begin):
    return begin("study", SPACE, sampler="tpe", pruner="median")


def test_trials_are_given_until_the_budget_is_spent(ledger):
    assert [ledger.next(3).number for _ in range(3)] == [0, 1, 2]
    assert ledger.next(3) is None
    assert ledger.next(4).number == 3


def test_a_step_is_taken_once(ledger):
    ledger.next(1)
    ledger.report(0, 1, 0.5)
    ledger.report(0, 1, 0.9)
    ledger.report(0, 2, 0.6)
    assert ledger.row(0).reports == {1: 0.5, 2: 0.6}


def test_ends_are_told_as_they_were(ledger):
    for _ in range(3):
        ledger.next(3)
    ledger.report(1, 1, 0.25)
    assert ledger.end(0, "COMPLETE", [0.5], **{METRICS: {"a": 1.0}}).notes[METRICS] == {"a": 1.0}
    ledger.end(1, "PRUNED")
    ledger.end(2, "FAIL", **{REASON: "NonFiniteLossError: j_m is nan"})
    complete, pruned, failed = ledger.rows()
    assert (complete.state, complete.value) == ("COMPLETE", 0.5)
    assert (pruned.state, pruned.reports) == ("PRUNED", {1: 0.25})
    assert (failed.state, failed.value) == ("FAIL", None)
    assert failed.notes[REASON] == "NonFiniteLossError: j_m is nan"
    assert ledger.best().number == 0


def test_an_end_is_told_once(ledger):
    ledger.next(1)
    ledger.end(0, "COMPLETE", [0.5])
    assert 0 not in ledger.in_hand()
    with pytest.raises(KeyError):
        ledger.end(0, "FAIL")


def test_the_next_driver_adopts_what_was_left_running(ledger, begin):
    first, second = ledger.next(3), ledger.next(3)
    ledger.report(first.number, 1, 0.5)
    ledger.end(second.number, "COMPLETE", [0.1])

    later = begin("study", SPACE)
    adopted = later.next(3)
    assert (adopted.number, adopted.params, adopted.reports) == (first.number, first.params, {1: 0.5})
    assert adopted.notes[ATTEMPTS] == 2
    assert later.next(3).number == 2
    assert later.next(3) is None


def test_a_driver_that_lost_its_lease_writes_nothing_more(ledger, begin):
    ledger.next(2)
    later = begin("study", SPACE)
    adopted = later.next(1)
    for write in (
        lambda: ledger.report(0, 1, 0.5),
        lambda: ledger.end(0, "FAIL"),
        lambda: ledger.note("a", 1),
        lambda: ledger.next(2),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert later.row(0) == adopted
    later.end(0, "COMPLETE", [1.0])


def test_drivers_that_work_side_by_side_share_the_trials(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    storages = [open_storage(f"sqlite:///{tmp_path}/ledger.db") for _ in range(2)]
    with ExitStack() as stack:
        held = [stack.enter_context(Lease(storage.engine, "study", join=True)) for storage in storages]
        share(*(Ledger(storage, "study", SPACE, lease) for storage, lease in zip(storages, held, strict=True)))


def share(first, second):
    taken = [ledger.next(5).number for ledger in (first, second, first, second, first)]
    assert taken == [0, 1, 2, 3, 4]
    assert first.next(5) is None
    assert second.next(5) is None
    first.release(0, crash="WorkerDied: ")
    assert second.next(5) is None
    assert first.next(5).number == 0


def test_a_driver_killed_while_it_drew_parameters_is_mended(begin):
    half = begin("study", {"hdml.alpha": SPACE["hdml.alpha"]})
    alpha = half.next(1).params["hdml.alpha"]
    adopted = begin("study", SPACE).next(1)
    assert adopted.params["hdml.alpha"] == alpha
    assert adopted.params.keys() == SPACE.keys()


def test_a_crashed_trial_is_taken_again_with_its_parameters(ledger):
    params = ledger.next(1).params
    ledger.report(0, 1, 0.5)
    ledger.release(0, crash="OSError: the disk is full")
    again = ledger.next(1)
    assert (again.number, again.params, again.reports, again.notes[ATTEMPTS]) == (0, params, {1: 0.5}, 2)
    assert again.notes[CRASHES] == ["OSError: the disk is full"]
    ledger.release(0)
    assert ledger.next(1).notes[CRASHES] == ["OSError: the disk is full"]


def test_failed_trials_are_tried_again_when_asked_for_and_only_those_that_crashed(ledger, begin):
    crashed, diverged = ledger.next(2), ledger.next(2)
    ledger.end(0, "FAIL", **{REASON: "OSError: ", CRASHES: ["OSError: "] * 3})
    ledger.end(1, "FAIL", **{REASON: "NonFiniteLossError: j_m is nan"})
    assert ledger.next(2) is None
    assert ledger.enqueue_failed() == 1
    again = ledger.next(2)
    assert (again.number, again.params) == (2, crashed.params)
    assert again.params != diverged.params
    assert ledger.next(2) is None
    ledger.end(2, "COMPLETE", [0.5])
    later = begin("study", SPACE)
    assert later.enqueue_failed() == 0
    assert [row.state for row in later.rows()] == ["FAIL", "FAIL", "COMPLETE"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_draws_what_it_would_have_drawn(begin, sampler):
    def draw(name, restarts):
        points = []
        ledger = begin(name, SPACE, sampler=sampler, seed=3)
        for number in range(12):
            if restarts:
                ledger = begin(name, SPACE, sampler=sampler, seed=3)
            row = ledger.next(12)
            points.append(row.params)
            ledger.end(number, "COMPLETE", [row.params["hdml.alpha"]])
        return points

    assert draw("one", restarts=False) == draw("other", restarts=True)


def test_enqueued_points_come_first_and_once(ledger, begin):
    point = {"hdml.alpha": 90.0, "hdml.beta": 1e4}
    ledger.enqueue([point])
    ledger.enqueue([point])
    assert ledger.rows() == []
    assert ledger.next(2).params == point
    ledger.end(0, "COMPLETE", [0.1])
    later = begin("study", SPACE)
    later.enqueue([point])
    assert later.next(2).params != point


def test_a_search_may_begin_with_the_best_points_of_another(ledger, begin, storage):
    for alpha, value in ((1.0, 0.1), (2.0, 0.9), (250.0, 1.0), (3.0, 0.5)):
        ledger.enqueue([{"hdml.alpha": alpha, "hdml.beta": 1.0}])
        ledger.end(ledger.next(4).number, "COMPLETE", [value])
    narrow = {"hdml.alpha": LogUniform(0.1, 100.0)}
    assert best_points(storage, "study", narrow, most=2) == [{"hdml.alpha": 2.0}, {"hdml.alpha": 3.0}]
    assert best_points(storage, None, narrow) == []
    with pytest.raises(LedgerError, match="study 'study' has no COMPLETE trial in this study's space"):
        best_points(storage, "study", {"optim.clip": Uniform(1.0, 2.0)})


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_bad_trial_is_given_up_by_every_pruner_but_none(begin, pruner):
    ledger = begin("study", SPACE, pruner=pruner, steps=4)
    for number in range(6):
        ledger.next(7)
        for step in range(1, 5):
            ledger.report(number, step, 0.9)
            ledger.should_prune(number, step)
        ledger.end(number, "COMPLETE", [0.9])
    ledger.next(7)
    gave_up = []
    for step in range(1, 5):
        ledger.report(6, step, 0.1)
        gave_up.append(ledger.should_prune(6, step))
    assert any(gave_up) == (pruner != "none")
    assert not ledger.should_prune(6, 1)  # a step that was told again decides nothing


def test_of_several_goals_the_front_is_found_and_the_first_goal_chooses(begin):
    ledger = begin("study", SPACE, directions=("maximize", "minimize"), sampler="nsga2")
    for values in ((0.5, 1.0), (0.9, 5.0), (0.4, 2.0)):
        number = ledger.next(3).number
        ledger.report(number, 1, values[0])
        assert not ledger.should_prune(number, 1)
        ledger.end(number, "COMPLETE", values)
    assert [row.number for row in ledger.front()] == [0, 1]
    assert (ledger.best().number, ledger.best().values) == (1, (0.9, 5.0))


def test_a_trial_above_a_limit_is_not_the_best(ledger):
    for value, excess in ((0.5, -1.0), (0.9, 0.5)):
        number = ledger.next(2).number
        ledger.limit(number, {"cost/peak_memory_mb": excess})
        ledger.end(number, "COMPLETE", [value])
    assert ledger.best().number == 0
    assert [row.number for row in ledger.ranked()] == [0]


def test_what_was_spent_is_the_sum_over_all_trials(ledger):
    for number in range(2):
        ledger.next(2)
        ledger.note_of(number, SPENT, {SECONDS: 10.0, GPU_SECONDS: 5.0})
    ledger.end(0, "FAIL")
    assert spent(ledger.rows()) == (20.0, 10.0)


def test_a_study_goes_on_only_on_its_own_terms(ledger):
    ledger.settle(terms(epochs=8), SPACE)
    ledger.settle(terms(epochs=8), SPACE)
    wider = {**SPACE, "hdml.alpha": LogUniform(0.01, 300.0)}
    ledger.settle(terms(wider, epochs=8), wider)
    with pytest.raises(LedgerError, match="the space, which is not a widening"):
        ledger.settle(terms(epochs=8), SPACE)
    with pytest.raises(LedgerError, match=r"epochs was 8, is 5.*--name OTHER.*--fresh"):
        ledger.settle(terms(wider, epochs=5), wider)


def test_a_setting_that_changes_no_bit_may_change(ledger):
    ledger.settle(terms(**{"data.resident": False}), SPACE)
    ledger.settle(terms(**{"data.resident": True}), SPACE)


def test_a_study_is_known_by_more_than_its_name(ledger, begin):
    identity = ledger.identity()
    assert ledger.identity() == identity
    assert begin("study", SPACE).identity() == identity
    assert begin("other", SPACE).identity() != identity


def test_a_study_put_aside_is_kept_under_its_new_name(ledger, begin, storage):
    begin("study-cub200", SPACE).next(1)
    begin("study.baseline").next(1)
    later = begin("study", SPACE)
    params = later.next(1).params
    set_aside(later._storage, "study", "study@then")
    assert existing(storage, "study@then").row(0).params == params
    assert existing(storage, "study-cub200").rows()
    with pytest.raises(LedgerError, match=r"no study 'study' in the ledger: it has \[study-cub200, study@then\]"):
        existing(storage, "study")


def test_no_best_without_a_complete_trial(ledger):
    ledger.next(1)
    ledger.end(0, "FAIL")
    with pytest.raises(LedgerError, match="has no COMPLETE trial within its limits yet"):
        ledger.best()


def test_a_database_that_is_gone_is_waited_for(ledger, monkeypatch, capsys):
    ledger.next(1)
    report, refused = ledger._live[0].report, []

    def gone_twice(value, step):
        if len(refused) < 2:
            refused.append(step)
            raise OperationalError("UPDATE", {}, Exception("connection refused"))
        report(value, step)

    monkeypatch.setattr(ledger._live[0], "report", gone_twice)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    ledger.report(0, 1, 0.5)
    assert ledger.row(0).reports == {1: 0.5}
    assert capsys.readouterr().err.count("the ledger does not answer, waiting for it: ") == 1
    refused.clear()
    monkeypatch.setattr(ledgers, "OUTAGE", -1.0)
    with pytest.raises(LedgerError, match="the ledger was gone for"):
        ledger.report(0, 2, 0.5)


def test_readers_never_wait(ledger, tmp_path):
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "the ledger nonsense can't be opened"),
        ("mysterydb://host/x", "the ledger mysterydb://host/x can't be opened"),
        ("sqlite:////proc/nowhere/ledger.db", "the ledger sqlite:////proc/nowhere/ledger.db can't be opened"),
        ("postgresql+psycopg://me:secret@127.0.0.1:9/x", r"me:\*\*\*@127.0.0.1:9/x can't be opened: .*refused"),
    ],
)
def test_an_address_of_no_ledger_is_refused(url, says):
    with pytest.raises(LedgerError, match=says) as refused:
        open_storage(url)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_tables_of_another_optuna_are_told_with_the_way_out(ledger, tmp_path):
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    connection.close()
    with pytest.raises(LedgerError, match="ledger.db can't be opened: .*storage upgrade"):
        open_storage(f"sqlite:///{tmp_path}/ledger.db")


def test_uniform_spaces_are_drawn_too(begin):
    row = begin("other", {"x": Uniform(0.0, 1.0)}, sampler="random").next(1)
    assert 0.0 <= row.params["x"] <= 1.0
