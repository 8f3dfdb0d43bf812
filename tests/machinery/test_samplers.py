"""Laws of samplers and pruners: what is drawn hangs on seed, number and ledger alone; what is bad is given up."""

from itertools import islice
from typing import get_args

import optuna
import pytest
from optuna.trial import TrialState

from studies.machinery import samplers
from studies.machinery.samplers import PRUNERS, SAMPLERS, exhausted, grid, make_pruner, make_sampler
from studies.machinery.space import Choice, Integer, LogUniform, Uniform, contains, suggest
from studies.machinery.storage import open_storage
from studies.machinery.study import Pruner, Sampler

SPACE = {
    "alpha": LogUniform(0.1, 300.0),
    "loss": Choice(("triplet", "npair")),
    "margin": Uniform(0.1, 1.0, when={"loss": "triplet"}),
    "size": Integer(1, 8),
    "weight": LogUniform(1e-3, 1.0, when={"loss": "npair"}),
}
ARMS = {
    "arm": Choice(("up", "down", "still")),
    "x": Uniform(0.0, 1.0, when={"arm": ("up", "down")}),
    "y": Uniform(0.0, 1.0, when={"arm": ("up",)}),
}
LINE = {"x": Uniform(0.0, 1.0), "y": Uniform(0.0, 1.0)}
LEARNERS = {"tpe": 60, "gp": 18, "nsga2": 80}
"""Samplers that know several goals and limits and learn from them, and in how many trials that is seen."""


def test_the_tables_have_what_a_study_may_name():
    assert set(SAMPLERS) == set(get_args(Sampler))
    assert set(PRUNERS) == set(get_args(Pruner))
    assert {*samplers.ONE_GOAL, *samplers.PARTS} <= {*SAMPLERS, *PRUNERS}


def ask(study, sampler, space, seed=0):
    study.sampler = make_sampler(sampler, space, seed, len(study.get_trials(deepcopy=False)))
    return study.ask()


def search(sampler, space, trials, value, directions=("maximize",), excess=None):
    """A study in memory of so many COMPLETE trials; `value` and `excess` are functions of what was drawn."""
    study = optuna.create_study(directions=directions)
    for _ in range(trials):
        trial = ask(study, sampler, space)
        drawn = suggest(trial, space)
        if excess is not None:
            trial.set_constraint("limit", excess(drawn))
        study.tell(trial, value(drawn))
    return study


def draw(path, sampler, space, trials, killed):
    """The points of a search; if `killed`, of one whose driver is killed in every trial."""

    def open_study():
        return optuna.create_study(storage=open_storage(f"sqlite:///{path}"), study_name="s", load_if_exists=True)

    points = []
    study = open_study()
    first = {"alpha": 90.0, "loss": "npair", "size": 3, "weight": 0.1, "arm": "up", "x": 0.5}
    study.enqueue_trial({name: first[name] for name in first if name in space})
    for number in range(trials):
        study.sampler = make_sampler(sampler, space, 3, number)
        trial = study.ask()
        if killed:  # when this many of its settings were drawn
            suggest(trial, dict(islice(space.items(), (number + 1) % len(space))))
            study = open_study()
            [left] = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            study.sampler = make_sampler(sampler, space, 3, left.number)
            trial = optuna.Trial(study, left._trial_id)
        points.append(suggest(trial, space))
        study.tell(trial, points[-1]["alpha"] / points[-1]["size"])
    return points


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_killed_in_every_trial_draws_what_it_would_have_drawn(tmp_path, sampler):
    trials = 20 if sampler == "nsga2" else 12  # its second generation begins at 16
    points = draw(tmp_path / "a.db", sampler, SPACE, trials, killed=False)
    assert draw(tmp_path / "b.db", sampler, SPACE, trials, killed=True) == points
    assert all(contains(SPACE, point) for point in points)
    assert {point["loss"] for point in points} == {"triplet", "npair"}
    assert len({str(point) for point in points}) == len(points)


APART = [name for name in SAMPLERS if name not in samplers.WHOLE]


def test_an_arm_is_drawn_as_if_it_were_alone():
    """Its own trials are what a search of its own space would have drawn, whatever the other arms reach."""

    def value(drawn):
        return drawn["x"] if drawn["arm"] == "up" else 9 - drawn.get("x", 0.0)

    study = search("tpe", ARMS, 36, value)
    by_arm = [[trial.params for trial in study.trials if trial.params["arm"] == arm] for arm in ARMS["arm"].values]
    assert [len(trials) for trials in by_arm] == [12, 12, 12]
    up, down, still = by_arm
    assert {frozenset(params) for params in up} == {frozenset({"arm", "x", "y"})}
    assert {frozenset(params) for params in still} == {frozenset({"arm"})}
    # They have learnt opposite things of x, which one sampler for both could not.
    assert sum(params["x"] for params in up[9:]) / 3 > 0.6
    assert sum(params["x"] for params in down[9:]) / 3 < 0.4


@pytest.mark.parametrize("sampler", APART)
def test_arms_take_turns_whatever_becomes_of_their_trials(sampler):
    study = optuna.create_study()
    study.enqueue_trial({"arm": "still"})
    arms = []
    for number in range(7):
        if sampler == "grid" and exhausted(make_sampler(sampler, ARMS, 0, number), study):
            break
        trial = ask(study, sampler, ARMS)
        arms.append(suggest(trial, ARMS)["arm"])
        study.tell(trial, state=TrialState.FAIL) if number % 2 else study.tell(trial, 1.0)
    if sampler == "grid":
        assert arms.count("still") == 1
    else:
        assert arms == ["still", "up", "down", "up", "down", "still", "up"]


def test_a_trial_that_is_tried_again_counts_once_for_its_arm():
    study = optuna.create_study()
    for again in (False, True):
        if again:
            study.enqueue_trial({"arm": "up", "x": 0.5, "y": 0.5}, user_attrs={samplers.RETRY_OF: 0})
        trial = ask(study, "random", ARMS)
        assert suggest(trial, ARMS)["arm"] == "up"
        study.tell(trial, state=TrialState.FAIL)
    assert suggest(ask(study, "random", ARMS), ARMS)["arm"] == "down"


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name not in (*samplers.WHOLE, "none")])
def test_a_trial_is_given_up_by_what_its_own_arm_reached(pruner):
    study = optuna.create_study(direction="maximize", pruner=make_pruner(pruner, 8))

    def prunes(arm, level):
        """Whether a trial of that arm which keeps to a level is given up on its way."""
        study.enqueue_trial({"arm": arm})
        trial = ask(study, "random", ARMS)
        suggest(trial, {"arm": ARMS["arm"]})
        for step in range(1, 9):
            trial.report(level + 0.001 * step, step)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return True
        study.tell(trial, level)
        return False

    strong = [prunes("up", 1.0 + 0.1 * number) for number in range(6)]
    weak = [prunes("still", 0.1 + 0.01 * number) for number in range(6)]
    assert weak == strong
    assert not any(weak)
    assert prunes("up", 0.5)
    assert prunes("still", 0.01)


def test_a_sobol_sequence_fills_the_space_of_every_arm_evenly():
    study = search("qmc", ARMS, 48, lambda drawn: 0.0)
    for arm, names in {"up": "xy", "down": "x"}.items():
        points = [trial.params for trial in study.trials if trial.params["arm"] == arm]
        for name in names:
            assert sorted(int(16 * point[name]) for point in points) == list(range(16))


@pytest.mark.parametrize("sampler", APART)
def test_a_search_of_arms_killed_in_every_trial_draws_what_it_would_have_drawn(tmp_path, sampler):
    space = {"arm": Choice(("up", "down")), **SPACE, "x": Uniform(0.0, 1.0, when={"arm": ("up",)})}
    points = draw(tmp_path / "a.db", sampler, space, 16, killed=False)
    assert draw(tmp_path / "b.db", sampler, space, 16, killed=True) == points
    assert {point["arm"] for point in points} == {"up", "down"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_trials_and_settings_draw_apart_from_each_other(sampler):
    drawn = []
    for seed in range(2):
        study = optuna.create_study()
        drawn += [suggest(ask(study, sampler, LINE, seed), LINE) for _ in range(3)]
    assert len({str(point) for point in drawn}) > 3
    assert any(point["x"] != point["y"] for point in drawn)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_widened_space_is_searched_to_its_new_ends(sampler):
    def space(high):
        return {"on": Choice((True, False)), "x": Uniform(0.0, high), "y": Uniform(0.0, high, when={"on": True})}

    study = optuna.create_study(direction="maximize")
    for high in [1.0] * 12 + [10.0] * 12:
        trial = ask(study, sampler, space(high))
        drawn = suggest(trial, space(high))
        study.tell(trial, drawn["x"] + drawn.get("y", 0.0))
    for name in ("x", "y"):
        assert max(trial.params.get(name, 0.0) for trial in study.trials) > 5.0


def test_a_gaussian_process_looks_back_on_the_newest_trials_and_the_best(monkeypatch):
    monkeypatch.setattr(samplers, "GP_NEWEST", 10)
    seen = []
    monkeypatch.setattr(
        optuna.samplers.GPSampler,
        "_sample_relative_impl",
        lambda self, study, completed, running, space: seen.append({trial.number for trial in completed}) or {},
    )
    values = iter([(0.0, 5.0), (9.0, 1.0), *[(1.0, 0.0)] * 20])
    search("gp", LINE, 20, lambda _: next(values), directions=("maximize", "maximize"))
    assert seen[-1] == {0, 1, *range(9, 19)}


def test_a_sobol_sequence_fills_its_space_evenly():
    points = [suggest(ask(study, "qmc", LINE), LINE) for study in [optuna.create_study()] for _ in range(16)]
    for name in LINE:
        assert sorted(int(16 * point[name]) for point in points) == list(range(16))


def test_a_grid_has_its_own_range_of_each_dimension():
    assert grid({"n": Integer(1, 3)}) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert grid({"x": LogUniform(1.0, 16.0)}) == [{"x": x} for x in (1.0, 2.0, 4.0, 8.0, 16.0)]
    conditional = {"on": Choice((True, False)), "x": Uniform(0.0, 1.0, when={"on": True})}
    assert grid(conditional) == [*({"on": True, "x": x / 4} for x in range(5)), {"on": False}]


def test_a_grid_ends_when_each_cell_was_begun_once():
    space = {"on": Choice((True, False)), "n": Integer(1, 3, when={"on": True})}
    off_grid, on_grid = {"on": True, "n": 7}, {"on": False}
    study = optuna.create_study()
    study.enqueue_trial(off_grid)
    study.enqueue_trial(on_grid)
    space |= {"n": Integer(1, 7, when={"on": True})}
    drawn = []
    while not exhausted(make_sampler("grid", space, 0, len(drawn)), study):
        trial = ask(study, "grid", space)
        drawn.append(suggest(trial, space))
        if len(drawn) % 4:  # every fourth is still RUNNING
            study.tell(trial, 0.0) if len(drawn) % 3 else study.tell(trial, state=TrialState.PRUNED)
    assert drawn[:2] == [off_grid, on_grid]
    assert sorted(str(point) for point in drawn) == sorted(str(cell) for cell in grid(space))
    study.enqueue_trial({"on": True, "n": 2})
    assert not exhausted(make_sampler("grid", space, 0, len(drawn)), study)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"grid"}))
def test_only_a_grid_is_ever_exhausted(sampler):
    assert not exhausted(make_sampler(sampler, LINE, 0, 0), optuna.create_study())


def late_share(study, holds):
    """Share of the second half of a study's trials of which it holds."""
    late = study.trials[len(study.trials) // 2 :]
    return sum(holds(trial.params) for trial in late) / len(late)


@pytest.mark.parametrize("sampler", LEARNERS)
def test_a_limit_keeps_a_search_within_it(sampler):
    def two_peaks(at):
        return max(1.0 - 2 * abs(at["x"] - 0.25), 1.2 - 2 * abs(at["x"] - 0.75)) - at["y"] ** 2

    free = search(sampler, LINE, LEARNERS[sampler], two_peaks)
    limited = search(sampler, LINE, LEARNERS[sampler], two_peaks, excess=lambda at: at["x"] - 0.5)
    assert late_share(free, lambda at: at["x"] <= 0.5) < 0.4
    assert late_share(limited, lambda at: at["x"] <= 0.5) > 0.7
    assert free.best_trial.params["x"] > 0.5 >= limited.best_trial.params["x"]


@pytest.mark.parametrize("directions", [("maximize",), ("maximize", "maximize")])
def test_trials_above_a_limit_are_never_best(directions):
    def goals(at):
        return [at["x"], at["y"]][: len(directions)]

    study = search("random", LINE, 9, goals, directions, excess=lambda at: at["x"] - 0.5)
    assert study.best_trials
    assert all(trial.params["x"] <= 0.5 for trial in study.best_trials)
    assert not search("random", LINE, 3, goals, directions, excess=lambda at: 1.0).best_trials


@pytest.mark.parametrize("sampler", LEARNERS)
def test_a_search_with_two_goals_closes_in_on_their_front(sampler):
    """It has y = 0 and x in [0, 1]."""

    def study(name):
        return search(
            name,
            {"x": Uniform(-2.0, 3.0), "y": Uniform(0.0, 1.0)},
            LEARNERS[sampler],
            lambda at: (at["x"] ** 2 + at["y"], (at["x"] - 1) ** 2 + at["y"]),
            directions=("minimize", "minimize"),
        )

    def near(at):
        return -0.25 <= at["x"] <= 1.25 and at["y"] < 0.25

    assert late_share(study(sampler), near) > late_share(study("random"), near) + 0.25


@pytest.mark.parametrize("sampler", LEARNERS)
def test_of_several_goals_a_trial_is_given_up_without_a_report_or_a_value(sampler):
    study = search(sampler, LINE, 9, lambda at: (at["x"], at["y"]), directions=("maximize", "minimize"))
    trial = ask(study, sampler, LINE)
    suggest(trial, LINE)
    with pytest.raises(NotImplementedError):
        trial.report(0.5, 1)
    ended = study.tell(trial, state=TrialState.PRUNED)
    assert (ended.state, ended.values) == (TrialState.PRUNED, None)
    assert contains(LINE, suggest(ask(study, sampler, LINE), LINE))


def reports(study, values):
    """Whether the pruner would give the next trial up after each of these reports."""
    trial = study.ask()
    answers = []
    for step, value in enumerate(values, start=1):
        trial.report(value, step)
        answers.append(trial.should_prune())
    study.tell(trial, values[-1])
    return answers


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_bad_trial_is_given_up_by_every_pruner_but_none(pruner):
    study = optuna.create_study(direction="maximize", pruner=make_pruner(pruner, 9), study_name="study")
    for trial in range(8):
        reports(study, [0.8 + 0.01 * trial + 0.001 * step for step in range(9)])
    assert any(reports(study, [0.1] * 9)) == (pruner != "none")


def test_hyperband_gives_up_before_any_trial_has_ended():
    study = optuna.create_study(direction="maximize", pruner=make_pruner("hyperband", 9), study_name="study")
    for trial in [study.ask() for _ in range(9)]:
        for step in range(1, 4):
            trial.report(1.0 - 0.1 * trial.number, step)
            if trial.should_prune():
                return
    pytest.fail("none of nine trials, each worse than the last, was given up")


def test_wilcoxon_gives_up_after_four_parts_that_all_are_worse():
    study = optuna.create_study(direction="maximize", pruner=make_pruner("wilcoxon", 6))
    reports(study, [0.5, 0.7, 0.4, 0.6, 0.5, 0.6])
    assert reports(study, [0.45, 0.6, 0.33, 0.52, 0.44, 0.5]) == [False, False, False, True, True, True]
    assert not any(reports(study, [0.55, 0.6, 0.45, 0.52, 0.56, 0.5]))
    assert not any(reports(study, [0.5, 0.7, 0.4, 0.6, 0.5, 0.6]))
