"""Studies as data, and the variants that a command line asks for."""

from dataclasses import replace

import pytest

from hdml_core.config import ConfigError, parse_setting
from studies.machinery.space import Choice, LogUniform, Uniform
from studies.machinery.study import TINY_TRIALS, Study, parse_field, variant

STUDY = Study(
    name="question",
    question="Why?",
    space={"hdml.alpha": LogUniform(0.1, 300.0)},
    base={"loss.name": "npair"},
    baseline={"synthesis": "none"},
)


ARMS = Study(
    name="arms",
    question="Which?",
    space={
        "optim.lr_embedder": LogUniform(1e-5, 1e-2),
        "loss.margin": Uniform(0.1, 2.0),
        "hdml.alpha": LogUniform(0.1, 300.0),
    },
    arms={
        "triplet": {"loss.name": "triplet", "synthesis": "none"},
        "npair": {"loss.name": "npair", "synthesis": "none"},
        "hdml_npair": {"loss.name": "npair"},
    },
    rivals={"hdml_npair": "npair"},
    trials=9,
)

FRONT = {"validation/recall_at_1": "maximize", "cost/gpu_seconds": "minimize"}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "question"),
        ({"dataset": "glyphs"}, "question"),
        ({"dataset": "cub200"}, "question-cub200"),
        ({"overrides": {"data.name": "cub200"}}, "question-cub200"),
        ({"tiny": True}, "question-tiny"),
        ({"dataset": "cub200", "name": "mine"}, "mine"),
    ],
)
def test_names_of_variants(asked, name):
    assert variant(STUDY, **asked).name == name


def test_a_study_of_a_data_set_has_its_own_name_there():
    birds = replace(STUDY, name="table_cub200", base={"data.name": "cub200"})
    names = [variant(birds, **asked).name for asked in ({}, {"dataset": "cub200"}, {"tiny": True}, {"dataset": "sop"})]
    assert names == ["table_cub200", "table_cub200", "table_cub200-tiny", "table_cub200-sop"]


def test_a_variant_has_its_data_sets_recipe_and_published_point():
    assert STUDY.published() == [{"hdml.alpha": 90.0}]
    triplet = variant(STUDY, overrides={"loss.name": "triplet"})
    assert triplet.published() == [{"hdml.alpha": 7.0}]
    cub = variant(replace(STUDY, base={"recipe": "authors"}), dataset="cub200", trials=7)
    assert (cub.config().data.batch_size, cub.config().hdml.beta, cub.trials) == (128, 5e3, 7)


def test_tiny_is_small_and_yields_to_what_is_said():
    assert variant(STUDY, tiny=True).trials == TINY_TRIALS
    assert variant(STUDY, tiny=True).config().optim.steps_per_epoch == 4
    longer = variant(STUDY, tiny=True, trials=9, overrides={"optim.epochs": 5})
    assert (longer.trials, longer.config().optim.epochs) == (9, 5)


def test_trials_and_baseline_differ_from_the_base_in_their_own_settings_only():
    assert STUDY.config({"hdml.alpha": 3.0}) == STUDY.config({"hdml.alpha": 3.0})
    assert STUDY.config({"hdml.alpha": 3.0}).hdml.alpha == 3.0
    assert STUDY.baseline_config().synthesis == "none"
    assert "hdml.alpha" not in STUDY.fixed()


def test_points_outside_the_space_are_not_tried_first():
    narrow = replace(STUDY, space={"hdml.alpha": LogUniform(0.1, 10.0)}, points=({"hdml.alpha": 5.0},))
    assert narrow.first_points() == [{"hdml.alpha": 5.0}]
    assert STUDY.first_points() == [{"hdml.alpha": 90.0}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trials": 0}, "trials of study 'question' must be >= 1, got 0"),
        ({"hours": 0.0}, "hours of study 'question' must be > 0, got 0.0"),
        ({"gpus_per_trial": 0.0}, "gpus_per_trial of study 'question' must be > 0"),
        ({"goals": {"test/recall_at_1": "maximize"}}, "goals of study 'question' must be of validation/recall_at_1, "),
        ({"goals": {"cost/seconds": "minimize"}}, "goals of study 'question' must be one of validation/.* first, got"),
        ({"goals": {}}, r"goals of study 'question' must be one of validation/.* first, got \[\]"),
        ({"limits": {"cost/pace": 1.0}}, "goals of study 'question' must be of validation/.*, got 'cost/pace'"),
        ({"folds": 6}, "folds of study 'question' must be at most data.folds = 5, got 6"),
        ({"max_cost": 10.0}, "node_price of study 'question' must be > 0 under a max_cost, got 0.0"),
        ({"test_seeds": 1}, r"test_seeds of study 'question' must be 0 or in \[2, 1000\], got 1"),
        ({"rivals": {"a": "b"}}, r"rivals of study 'question' must be of the arms \[\], got 'a'"),
        ({"arms": {"a": {"data.name": "sop"}}, "baseline": None}, "data.name of arm 'a' must be 'glyphs', got 'sop'"),
        ({"arms": {"a": {}}}, "baseline of study 'question' must be None beside arms: make it one of them, got"),
        ({"arms": {"a": {"hdml.alpha": -1.0}}, "baseline": None}, "hdml.alpha must be >= 0, got -1.0"),
        ({"baseline": None, "test_seeds": 2}, "test_seeds .* must be 0 where there is neither an arm nor a baseline"),
        (
            {"arms": {"a": {}, "b": {}}, "baseline": None, "trials": 3},
            "trials .* as many for each of the 2 arms, got 3",
        ),
        ({"pruner": "hyperband", "arms": {"a": {}}, "baseline": None}, "pruner .* must be another for several arms"),
        ({"sampler": "nsga2", "arms": {"a": {}}, "baseline": None}, "sampler .* must be another for several arms"),
        ({"sampler": "cmaes", "goals": FRONT}, "sampler of study 'question' must be another for several goals"),
        ({"space": {"hdml.alhpa": LogUniform(0.1, 1.0)}}, "unknown setting 'hdml.alhpa'.*did you mean 'alpha'"),
        ({"space": {"hdml.alpha": Uniform(-1.0, 1.0)}}, "hdml.alpha must be >= 0, got -1.0"),
        ({"baseline": {"hdml.alpha": -1.0}}, "hdml.alpha must be >= 0, got -1.0"),
    ],
)
def test_a_study_that_can_not_be_run_is_refused_when_it_is_declared(change, says):
    with pytest.raises(ConfigError, match=says):
        replace(STUDY, **change)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tiny": True, "dataset": "cub200"}, "--tiny is a toy size of glyphs"),
        ({"overrides": dict([parse_setting("hdml.alpha=7")])}, "hdml.alpha is what study 'question' searches"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(asked, says):
    with pytest.raises(ConfigError, match=says):
        variant(STUDY, **asked)


def test_what_all_arms_settle_can_not_be_set():
    with pytest.raises(ConfigError, match="loss.name is what the arms of study 'arms' differ in: --set can't fix it"):
        variant(ARMS, overrides={"loss.name": "lifted"})
    # What some settle holds for the others.
    daml = variant(ARMS, overrides={"synthesis": "daml"})
    assert [config.synthesis for config in daml.configs().values()] == ["none", "none", "daml"]


def test_a_trial_has_a_part_for_each_fold_and_seed():
    assert STUDY.parts() == ({"seed": 0, "data.fold": 0},)
    parts = replace(STUDY, folds=2, seeds=2, base={"data.fold": 4, "seed": 7}).parts()
    assert [tuple(part.values()) for part in parts] == [(7, 4), (7, 0), (8, 4), (8, 0)]


def test_an_arm_is_searched_over_what_it_reads():
    space = ARMS.search_space
    readers = {name: dimension.when["arm"] for name, dimension in space.items() if name != "arm"}
    assert space["arm"] == Choice(("triplet", "npair", "hdml_npair"))
    assert readers == {
        "optim.lr_embedder": ("triplet", "npair", "hdml_npair"),
        "loss.margin": ("triplet",),
        "hdml.alpha": ("hdml_npair",),
    }
    assert STUDY.search_space == STUDY.space


def test_what_arms_differ_in_is_written_down_too():
    fixed = ARMS.fixed()
    assert (fixed["triplet: data.batch_size"], fixed["npair: data.batch_size"]) == (60, 64)
    assert fixed["hdml_npair: synthesis"] == "hdml"


def test_each_arm_begins_at_its_own_published_point():
    assert ARMS.first_points() == [
        {"arm": "triplet", "optim.lr_embedder": 1e-3, "loss.margin": 1.0},
        {"arm": "npair", "optim.lr_embedder": 1e-3},
        {"arm": "hdml_npair", "optim.lr_embedder": 1e-3, "hdml.alpha": 90.0},
    ]


def test_an_arm_brings_what_its_recipe_brings():
    config = ARMS.config({"arm": "triplet", "loss.margin": 0.5})
    assert (config.loss.name, config.loss.margin, config.hdml.alpha, config.synthesis) == ("triplet", 0.5, 7.0, "none")
    assert config.data.batch_size == 60
    fixed = ARMS.fixed()
    assert "loss.name" not in fixed
    assert "data.batch_size" not in fixed
    assert fixed["data.name"] == "glyphs"


def test_a_tiny_study_has_a_trial_for_each_arm_and_two_test_seeds():
    many = replace(
        ARMS, arms={str(number): {"seed": number} for number in range(7)}, rivals={}, test_seeds=8, folds=5, trials=7
    )
    tiny = variant(many, tiny=True)
    assert (tiny.trials, tiny.test_seeds, tiny.folds) == (7, 2, 1)
    assert variant(ARMS, tiny=True).test_seeds == 0


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("study.prunner=median", r"unknown setting 'study.prunner': a study has \[trials, "),
        ("study.space=x", "unknown setting 'study.space'"),
        ("study.folds=two", "study.folds must be of type int, got 'two'"),
        ("study.paper_mode=yes", "study.paper_mode must be true or false, got 'yes'"),
        ("study.pruner=asha", "study.pruner must be one of median, halving, .*, got 'asha'"),
    ],
)
def test_a_field_that_can_not_be_set_so_is_refused(assignment, says):
    with pytest.raises(ConfigError, match=says):
        parse_field(assignment)
