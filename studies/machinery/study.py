"""A study as data: one question, its base settings, its space, its goal, its budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hdml_core.config import (
    Config,
    ConfigError,
    Setting,
    Settings,
    recipe_config,
    to_settings,
    with_settings,
)
from studies.machinery.records import GOALS, VALIDATED, Direction
from studies.machinery.samplers import ONE_GOAL, PARTS
from studies.machinery.space import Space, active, check_space, contains, ends

Sampler = Literal["tpe", "gp", "cmaes", "nsga2", "random", "grid", "qmc"]
Pruner = Literal["median", "halving", "hyperband", "wilcoxon", "none"]

COUNTS = ("trials", "folds", "seeds", "parallel", "cpus_per_trial", "max_attempts")
AMOUNTS = ("hours", "gpu_hours", "max_cost", "gpus_per_trial", "hang_minutes", "disk_gb")
SETTABLE = (*COUNTS, *AMOUNTS, "node_price", "sampler", "pruner", "seed", "failures_allowed")
"""Fields that a command line may set, as study.NAME=VALUE."""

TINY_TRIALS = 4
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
    """On how many of the `data.folds` class-disjoint folds a trial is validated, one after another from `data.fold`."""
    seeds: int = 1
    """How often on each fold, from `seed` upwards. The score is the mean over folds and seeds."""
    trials: int = 24
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
    """Used where there are GPUs; 0.5 puts two trials on each."""
    max_attempts: int = 3
    """How often a trial whose worker died or raised is run before it FAILs; a loss that is not finite FAILs at once."""
    hang_minutes: float = 120.0
    """A worker that has told nothing for so long is ended; that counts as an attempt."""
    disk_gb: float = math.inf
    """Cap on the study's checkpoints; those of the best trial and of what runs stay, the others go oldest first."""
    failures_allowed: float = 0.25
    """Share of the trials that may FAIL before the study itself counts as failed."""

    def __post_init__(self) -> None:
        simple = len(self.goals) == 1 and not self.limits
        for name, value, rule, holds in (
            *((name, getattr(self, name), ">= 1", getattr(self, name) >= 1) for name in COUNTS),
            *((name, getattr(self, name), "> 0", getattr(self, name) > 0) for name in AMOUNTS),
            ("node_price", self.node_price, ">= 0", self.node_price >= 0),
            ("node_price", self.node_price, "> 0 under a max_cost", self.node_price > 0 or self.max_cost == math.inf),
            *(("goals", name, f"of {', '.join(GOALS)}", name in GOALS) for name in (*self.goals, *self.limits)),
            ("goals", [*self.goals], f"one of {', '.join(VALIDATED)} first", self.goal in VALIDATED),
            ("sampler", self.sampler, "another for several goals or limits", simple or self.sampler not in ONE_GOAL),
            ("seed", self.seed, ">= 0", self.seed >= 0),
        ):
            if not holds:
                raise ConfigError(f"{name} of study {self.name!r} must be {rule}, got {value!r}")
        config = self.config()
        if config.retrieval.ks[0] != 1:
            raise ConfigError(f"retrieval.ks of study {self.name!r} must begin with 1, got {config.retrieval.ks}")
        if self.folds > config.data.folds:
            rule = f"at most data.folds = {config.data.folds}"
            raise ConfigError(f"folds of study {self.name!r} must be {rule}, got {self.folds}")
        check_space(self.space)
        for name, dimension in self.space.items():
            for end in ends(dimension):
                with_settings(config, {**dimension.when, name: end})
        if self.baseline is not None:
            with_settings(config, self.baseline)

    @property
    def steps_are_parts(self) -> bool:
        """Whether what the pruner looks at are a trial's folds and seeds, and not its epochs."""
        return self.pruner in PARTS

    def config(self, params: Settings | None = None) -> Config:
        """The run that the base describes, with a trial's parameters where given."""
        return with_settings(recipe_config(self.base), params or {})

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

    def published(self) -> dict[str, Setting]:
        """The base's own point of the space: what recipe, data set and loss were published with."""
        return active(self.space, to_settings(self.config()))

    def first_points(self) -> list[Settings]:
        """The points to try first, those that the space has."""
        points = [self.published(), *(active(self.space, point) for point in self.points)]
        return [point for point in points if contains(self.space, point)]

    def fixed(self) -> dict[str, Any]:
        """Every setting that is the same in all trials, in plain types, to be written down and compared."""
        settings = to_settings(self.config())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
            if name not in self.space
        }


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
        value = text if choices else hint(text)
    except ValueError as error:
        raise ConfigError(f"study.{name} must be of type {hint.__name__}, got {text!r}") from error
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
    searched = [setting for setting in overrides if setting in study.space]
    if searched:
        raise ConfigError(f"{searched[0]} is what study {study.name!r} searches: --set can't fix it")
    if tiny and dataset not in (None, "glyphs"):
        raise ConfigError(f"--tiny is a toy size of glyphs: leave out --dataset {dataset}, or --tiny")
    base: dict[str, Setting] = {**study.base, **(TINY if tiny else {})}
    if dataset is not None:
        base["data.name"] = dataset
    base |= overrides
    data_name = recipe_config(base).data.name
    default_name = study.name + ("" if data_name == "glyphs" else f"-{data_name}") + ("-tiny" if tiny else "")
    if tiny:
        changes = {"trials": TINY_TRIALS, **changes}
    return replace(study, name=name or default_name, base=base, **changes)
