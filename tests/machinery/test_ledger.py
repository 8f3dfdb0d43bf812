"""The laws of the ledger: every step once, every end once and true, nothing lost when a driver goes."""

import sqlite3

import pytest

from studies.machinery.ledger import PRUNERS, SAMPLERS, Ledger, LedgerError, existing, open_storage, set_aside
from studies.machinery.space import LogUniform, Uniform, to_json

SPACE = {"hdml.alpha": LogUniform(0.1, 300.0), "hdml.beta": LogUniform(0.1, 1e5)}


def terms(space=SPACE, **settings):
    return {
        "settings": settings,
        "baseline": None,
        "goal": "g",
        "direction": "maximize",
        "data": "0",
        "space": to_json(space),
    }


@pytest.fixture
def ledger(storage):
    return Ledger(storage, "study", SPACE, sampler="tpe", pruner="median")


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
    assert ledger.end(0, "COMPLETE", 0.5, metrics={"a": 1.0}).notes["metrics"] == {"a": 1.0}
    ledger.end(1, "PRUNED")
    ledger.end(2, "FAIL", reason="NonFiniteLossError: j_m is nan")
    complete, pruned, failed = ledger.rows()
    assert (complete.state, complete.value) == ("COMPLETE", 0.5)
    assert (pruned.state, pruned.reports) == ("PRUNED", {1: 0.25})
    assert (failed.state, failed.value) == ("FAIL", None)
    assert failed.notes["reason"] == "NonFiniteLossError: j_m is nan"
    assert ledger.best().number == 0


def test_an_end_is_told_once(ledger):
    ledger.next(1)
    ledger.end(0, "COMPLETE", 0.5)
    assert not ledger.in_hand(0)
    with pytest.raises(KeyError):
        ledger.end(0, "FAIL")


def test_the_next_driver_adopts_what_was_left_running(ledger, storage):
    first, second = ledger.next(3), ledger.next(3)
    ledger.report(first.number, 1, 0.5)
    ledger.end(second.number, "COMPLETE", 0.1)

    later = Ledger(storage, "study", SPACE)
    adopted = later.next(3)
    assert (adopted.number, adopted.params, adopted.reports) == (first.number, first.params, {1: 0.5})
    assert adopted.notes["attempts"] == 2
    assert later.next(3).number == 2
    assert later.next(3) is None


def test_a_driver_killed_while_it_drew_parameters_is_mended(storage):
    half = Ledger(storage, "study", {"hdml.alpha": SPACE["hdml.alpha"]})
    alpha = half.next(1).params["hdml.alpha"]
    adopted = Ledger(storage, "study", SPACE).next(1)
    assert adopted.params["hdml.alpha"] == alpha
    assert adopted.params.keys() == SPACE.keys()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_draws_what_it_would_have_drawn(tmp_path, sampler):
    def draw(path, restarts):
        storage = open_storage(f"sqlite:///{path}")
        points = []
        ledger = Ledger(storage, "study", SPACE, sampler=sampler, seed=3)
        for number in range(12):
            if restarts:
                ledger = Ledger(storage, "study", SPACE, sampler=sampler, seed=3)
            row = ledger.next(12)
            points.append(row.params)
            ledger.end(number, "COMPLETE", row.params["hdml.alpha"])
        return points

    assert draw(tmp_path / "a.db", restarts=False) == draw(tmp_path / "b.db", restarts=True)


def test_enqueued_points_come_first_and_once(ledger, storage):
    point = {"hdml.alpha": 90.0, "hdml.beta": 1e4}
    ledger.enqueue([point])
    ledger.enqueue([point])
    assert ledger.rows() == []
    assert ledger.next(2).params == point
    Ledger(storage, "study", SPACE).enqueue([point])
    assert ledger.next(2).params != point


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_bad_trial_is_given_up_by_every_pruner_but_none(storage, pruner):
    ledger = Ledger(storage, "study", SPACE, pruner=pruner)
    for number in range(6):
        ledger.next(7)
        for step in range(1, 5):
            ledger.report(number, step, 0.9)
            ledger.should_prune(number, step)
        ledger.end(number, "COMPLETE", 0.9)
    ledger.next(7)
    gave_up = []
    for step in range(1, 5):
        ledger.report(6, step, 0.1)
        gave_up.append(ledger.should_prune(6, step))
    assert any(gave_up) == (pruner != "none")
    assert not ledger.should_prune(6, 1)  # a step that was told again decides nothing


def test_a_study_goes_on_only_on_its_own_terms(ledger):
    ledger.settle(terms(epochs=8), SPACE)
    ledger.settle(terms(epochs=8), SPACE)
    wider = {**SPACE, "hdml.alpha": LogUniform(0.01, 300.0)}
    ledger.settle(terms(wider, epochs=8), wider)
    with pytest.raises(LedgerError, match="the space, which is not a widening"):
        ledger.settle(terms(epochs=8), SPACE)
    with pytest.raises(LedgerError, match=r"epochs was 8, is 5.*--name OTHER.*--fresh"):
        ledger.settle(terms(wider, epochs=5), wider)


def test_a_study_put_aside_is_kept_under_its_new_name(ledger, storage):
    Ledger(storage, "study.baseline", {}).next(1)
    Ledger(storage, "study-cub200", SPACE).next(1)
    params = ledger.next(1).params
    set_aside(storage, "study", "study@then")
    assert existing(storage, "study@then").row(0).params == params
    assert existing(storage, "study-cub200").rows()
    with pytest.raises(LedgerError, match=r"no study 'study' in the ledger: it has \[study-cub200, study@then\]"):
        existing(storage, "study")


def test_no_best_without_a_complete_trial(ledger):
    ledger.next(1)
    ledger.end(0, "FAIL")
    with pytest.raises(LedgerError, match="has no COMPLETE trial yet"):
        ledger.best()


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


def test_uniform_spaces_are_drawn_too(storage):
    row = Ledger(storage, "other", {"x": Uniform(0.0, 1.0)}, sampler="random").next(1)
    assert 0.0 <= row.params["x"] <= 1.0
