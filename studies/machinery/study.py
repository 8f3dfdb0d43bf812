"""A study as data: one question, its base settings, its space, its goal, its budget."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hdml_core.config import (
    Config,
    ConfigError,
    Setting,
    Settings,
    idle,
    recipe_config,
    to_settings,
    with_settings,
)
from studies.machinery.records import ARM, GOALS, VALIDATED, Direction
from studies.machinery.samplers import ONE_GOAL, PARTS, WHOLE
from studies.machinery.space import Choice, Dimension, Space, active, check_space, contains, ends, met

Sampler = Literal["tpe", "gp", "cmaes", "nsga2", "random", "grid", "qmc"]
Pruner = Literal["median", "halving", "hyperband", "wilcoxon", "none"]

COUNTS = ("trials", "folds", "seeds", "parallel", "cpus_per_trial", "processes_per_trial", "max_attempts")
AMOUNTS = ("hours", "gpu_hours", "max_cost", "gpus_per_trial", "hang_minutes", "disk_gb")
NOT_NEGATIVE = ("node_price", "seed")
SETTABLE = (*COUNTS, *AMOUNTS, *NOT_NEGATIVE, "test_seeds", "paper_mode", "sampler", "pruner", "failures_allowed")
"""Fields that a command line may set, as study.NAME=VALUE."""

MOST_SEEDS = 1000
"""Trainings of an arm with fresh seeds, at one opening of the test classes."""
Rule = tuple[str, Any, str, bool]
"""A field's name, its value, what it must be, and whether it is."""

TINY_TRIALS, TINY_TEST_SEEDS = 4, 2
TINY: Settings = {
    "data.name": "glyphs",
    "data.batch_size": 24,
    "network.embedding_size": 16,
    "network.generator_hidden": 32,
    "optim.epochs": 3,
    "optim.steps_per_epoch": 4,
    "retrieval.clusterings": 1,
}
"""The toy size at which --tiny runs any study."""


@dataclass(frozen=True)
class Study:
    """A question put to a search. A file of one makes a command line, a tiny mode, a test and a record of its own."""

    name: str
    question: str
    space: Space
    base: Settings = field(default_factory=dict)
    """What every trial has; the recipe gives the rest."""
    arms: Mapping[str, Settings] = field(default_factory=dict)
    """Variants of the base that stand side by side, such as the methods of a table. All have as many trials, each is
    searched as if it were alone, and only over those settings of the space that it reads."""
    rivals: Mapping[str, str] = field(default_factory=dict)
    """Which arm an arm is compared with, paired by seed."""
    baseline: Settings | None = None
    """What to change of the base for the row that the search is to beat."""
    points: Sequence[Settings] = ()
    """Points to try first; the base's own, the published one, is always the first of all."""
    goals: Mapping[str, Direction] = field(default_factory=lambda: {"validation/recall_at_1": "maximize"})
    """Metrics that count, at a trial's last epoch: a maximum over epochs would reward noise, could not be pruned
    fairly, and is not what `confirm` measures. The first is what pruners and tables look at; of several, the search
    looks for the Pareto front."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Upper bounds of metrics at a trial's last epoch, such as cost/peak_memory_mb; a trial above one can't be best."""
    folds: int = 1
    """On how many of the `data.folds` class-disjoint folds a trial is validated, counted from `data.fold`."""
    seeds: int = 1
    """How often on each fold, from `seed` upwards. The score is the mean over folds and seeds."""
    trials: int = 24
    """In all; of several arms, as many times their number as each is to have."""
    test_seeds: int = 0
    """With so many fresh seeds the study's last act is to open the test classes; 0 leaves that to `confirm`."""
    paper_mode: bool = False
    """Whether the test classes choose an epoch then, beside the honest number."""
    hours: float = math.inf
    """After so many hours no trial is begun; those that run then end as they would."""
    gpu_hours: float = math.inf
    """Nor after so many GPU-hours, those of earlier drivers included."""
    max_cost: float = math.inf
    """Nor after so much was spent, at `node_price`."""
    node_price: float = 0.0
    """Price of an hour of one node, in any currency; a trial pays for its share of the node."""
    sampler: Sampler = "tpe"
    pruner: Pruner = "median"
    seed: int = 0
    parallel: int = 8
    """Trials at once, at most; the more, the less each can learn from the others."""
    cpus_per_trial: int = 1
    gpus_per_trial: float = 1.0
    """Used where there are GPUs; 0.5 puts two trials on each, and of several each has a process of its own."""
    processes_per_trial: int = 1
    """Train each trial together, on as many CPUs each; what they compute is what one would, but for rounding."""
    max_attempts: int = 3
    """How often a trial whose worker died or raised is run before it FAILs; a loss that is not finite FAILs at once."""
    hang_minutes: float = 120.0
    """A worker that has told nothing for so long is ended; that counts as an attempt."""
    disk_gb: float = math.inf
    """Cap on the study's checkpoints; those of the best trial and of what runs stay, the others go oldest first."""
    failures_allowed: float = 0.25
    """Share of the trials that may FAIL before the study itself counts as failed."""

    def __post_init__(self) -> None:
        for name, value, rule, holds in (*self._rules_of_amounts(), *self._rules_of_goals(), *self._rules_of_arms()):
            if not holds:
                raise ConfigError(f"{name} of study {self.name!r} must be {rule}, got {value!r}")
        config = self.config()
        if config.retrieval.ks[0] != 1:
            raise ConfigError(f"retrieval.ks of study {self.name!r} must begin with 1, got {config.retrieval.ks}")
        if self.folds > config.data.folds:
            rule = f"at most data.folds = {config.data.folds}"
            raise ConfigError(f"folds of study {self.name!r} must be {rule}, got {self.folds}")
        check_space(self.space)
        for arm, of_arm in self.configs().items():
            if of_arm.data.name != config.data.name:
                raise ConfigError(f"data.name of arm {arm!r} must be {config.data.name!r}, got {of_arm.data.name!r}")
            for name, dimension in self.space.items():
                for end in ends(dimension):
                    with_settings(of_arm, {**met(dimension), name: end})
        if self.baseline is not None:
            with_settings(config, self.baseline)

    def _rules_of_amounts(self) -> Iterator[Rule]:
        for name in COUNTS:
            yield name, getattr(self, name), ">= 1", getattr(self, name) >= 1
        for name in AMOUNTS:
            yield name, getattr(self, name), "> 0", getattr(self, name) > 0
        for name in NOT_NEGATIVE:
            yield name, getattr(self, name), ">= 0", getattr(self, name) >= 0
        yield "node_price", self.node_price, "> 0 under a max_cost", self.node_price > 0 or self.max_cost == math.inf
        seeds, compared = self.test_seeds, bool(self.arms) or self.baseline is not None
        yield "test_seeds", seeds, f"0 or in [2, {MOST_SEEDS}]", seeds == 0 or 2 <= seeds <= MOST_SEEDS
        yield "test_seeds", seeds, "0 where there is neither an arm nor a baseline to compare", seeds == 0 or compared

    def _rules_of_goals(self) -> Iterator[Rule]:
        for name in (*self.goals, *self.limits):
            yield "goals", name, f"of {', '.join(GOALS)}", name in GOALS
        yield "goals", [*self.goals], f"one of {', '.join(VALIDATED)} first", self.goal in VALIDATED
        fits = self.sampler not in ONE_GOAL or (len(self.goals) == 1 and not self.limits)
        yield "sampler", self.sampler, "another for several goals or limits", fits

    def _rules_of_arms(self) -> Iterator[Rule]:
        for name in (*self.rivals, *self.rivals.values()):
            yield "rivals", name, f"of the arms [{', '.join(self.arms)}]", name in self.arms
        if self.arms:
            yield "baseline", self.baseline, "None beside arms: make it one of them", self.baseline is None
            for name in ("sampler", "pruner"):
                yield name, getattr(self, name), "another for several arms", getattr(self, name) not in WHOLE
            evenly = self.sampler == "grid" or self.trials % len(self.arms) == 0
            yield "trials", self.trials, f"as many for each of the {len(self.arms)} arms", evenly

    @property
    def steps_are_parts(self) -> bool:
        """Whether what the pruner looks at are a trial's folds and seeds, and not its epochs."""
        return self.pruner in PARTS

    @property
    def search_space(self) -> Space:
        """What a trial draws: its arm, where there are several, and then what of the space that arm reads."""
        if not self.arms:
            return self.space
        searched: dict[str, Dimension] = {ARM: Choice(tuple(self.arms))}
        unread = {arm: idle(config) for arm, config in self.configs().items()}
        for name, dimension in self.space.items():
            readers = tuple(arm for arm in self.arms if name not in unread[arm])
            if readers:
                searched[name] = replace(dimension, when={ARM: readers, **dimension.when})
        return searched

    def config(self, params: Settings | None = None) -> Config:
        """The run that the base describes, with a trial's parameters, its arm among them, where given."""
        drawn = dict(params or {})
        arm = drawn.pop(ARM, None)
        return with_settings(recipe_config({**self.base, **(self.arms[str(arm)] if arm is not None else {})}), drawn)

    def configs(self) -> dict[str, Config]:
        """The base's run of each arm; without arms there is one, of no name."""
        return {arm: self.config({ARM: arm}) for arm in self.arms} or {"": self.config()}

    def baseline_config(self) -> Config:
        """The run that the search is to beat."""
        return recipe_config({**self.base, **(self.baseline or {})})

    def parts(self) -> tuple[Settings, ...]:
        """What to change of a trial for each of its parts, its seeds and folds, in the order in which they run."""
        config = self.config()
        return tuple(
            {"seed": config.seed + seed, "data.fold": (config.data.fold + fold) % config.data.folds}
            for seed in range(self.seeds)
            for fold in range(self.folds)
        )

    @property
    def goal(self) -> str:
        """The first goal."""
        return next(iter(self.goals), "")

    def published(self) -> list[Settings]:
        """The base's own point of the space, of each arm: what recipe, data set and loss were published with."""
        return self._inside([{ARM: arm, **to_settings(config)} for arm, config in self.configs().items()])

    def first_points(self) -> list[Settings]:
        """The points to try first, those that the space has."""
        return [*self.published(), *self._inside(self.points)]

    def _inside(self, points: Sequence[Settings]) -> list[Settings]:
        """What is searched of those points that the space has."""
        space = self.search_space
        return [active(space, point) for point in points if contains(space, point)]

    def fixed(self) -> dict[str, Any]:
        """Every setting that no trial draws, in plain types, to be written down and compared; of several arms, that of
        each where they differ.
        """
        of_arms = {arm: to_settings(config) for arm, config in self.configs().items()}
        fixed: dict[str, Any] = {}
        for name in [name for name in next(iter(of_arms.values())) if name not in self.space]:
            values = {arm: settings[name] for arm, settings in of_arms.items()}
            alike = len(set(values.values())) == 1
            fixed |= {name: next(iter(values.values()))} if alike else {f"{arm}: {name}": values[arm] for arm in values}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fixed.items()}


def parse_field(assignment: str) -> tuple[str, Any]:
    """Read "study.NAME=VALUE", one of SETTABLE, by the type of the field.

    >>> parse_field("study.pruner=wilcoxon"), parse_field("study.gpu_hours=12")
    (('pruner', 'wilcoxon'), ('gpu_hours', 12.0))
    """
    name, _, text = assignment.removeprefix("study.").partition("=")
    if name not in SETTABLE:
        raise ConfigError(f"unknown setting 'study.{name}': a study has [{', '.join(SETTABLE)}]")
    hint = get_type_hints(Study)[name]
    choices = get_args(hint) if get_origin(hint) is Literal else None
    try:
        value = text if choices else {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError) as error:
        wanted = "true or false" if hint is bool else f"of type {hint.__name__}"
        raise ConfigError(f"study.{name} must be {wanted}, got {text!r}") from error
    if choices and value not in choices:
        raise ConfigError(f"study.{name} must be one of {', '.join(choices)}, got {text!r}")
    return name, value


def variant(
    study: Study,
    *,
    dataset: str | None = None,
    tiny: bool = False,
    overrides: Mapping[str, Setting] | None = None,
    name: str | None = None,
    **changes: Any,
) -> Study:
    """The study as a command line asks for it: NAME, NAME-DATASET, NAME-tiny, or under a name of its own.

    `changes` are of the study's own fields. Raises ConfigError for a setting that is unknown, out of range or searched.
    """
    overrides = overrides or {}
    for setting in overrides:
        if setting in study.space:
            raise ConfigError(f"{setting} is what study {study.name!r} searches: --set can't fix it")
        if study.arms and all(setting in settings for settings in study.arms.values()):
            raise ConfigError(f"{setting} is what the arms of study {study.name!r} differ in: --set can't fix it")
    if tiny and dataset not in (None, "glyphs"):
        raise ConfigError(f"--tiny is a toy size of glyphs: leave out --dataset {dataset}, or --tiny")
    base: dict[str, Setting] = {**study.base, **(TINY if tiny else {})}
    if dataset is not None:
        base["data.name"] = dataset
    base |= overrides
    data_name = recipe_config(base).data.name
    own = "glyphs" if tiny else study.config().data.name
    default_name = study.name + ("" if data_name == own else f"-{data_name}") + ("-tiny" if tiny else "")
    if tiny:
        seeds = {"test_seeds": TINY_TEST_SEEDS} if study.test_seeds else {}
        changes = {"trials": len(study.arms) or TINY_TRIALS, "folds": 1, "seeds": 1, **seeds, **changes}
    return replace(study, name=name or default_name, base=base, **changes)
