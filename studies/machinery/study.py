"""A study as data: one question, its base settings, its space, its goal, its budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hdml_core.config import (
    Config,
    ConfigError,
    Setting,
    Settings,
    recipe_config,
    to_settings,
    with_settings,
)
from studies.machinery.records import GOALS, Direction
from studies.machinery.space import Space, contains, ends

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
    goal: str = "validation/recall_at_1"
    """Metric that counts, at a trial's last epoch: a maximum over epochs would reward noise, could not be pruned
    fairly, and is not what `confirm` measures."""
    direction: Direction = "maximize"
    trials: int = 24
    hours: float = math.inf
    """After so many hours no trial is begun; those that run then end as they would."""
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "halving", "none"] = "median"
    seed: int = 0
    parallel: int = 8
    """Trials at once, at most; the more, the less each can learn from the others."""
    cpus_per_trial: int = 1
    gpus_per_trial: float = 1.0
    """Used where there are GPUs; 0.5 puts two trials on each."""
    failures_allowed: float = 0.25
    """Share of the trials that may FAIL before the study itself counts as failed."""

    def __post_init__(self) -> None:
        for name, value, rule, holds in (
            ("trials", self.trials, ">= 1", self.trials >= 1),
            ("goal", self.goal, f"one of {', '.join(GOALS)}", self.goal in GOALS),
            ("hours", self.hours, "> 0", self.hours > 0),
            ("gpus_per_trial", self.gpus_per_trial, "> 0", self.gpus_per_trial > 0),
        ):
            if not holds:
                raise ConfigError(f"{name} of study {self.name!r} must be {rule}, got {value!r}")
        config = self.config()
        for name, dimension in self.space.items():
            for end in ends(dimension):
                with_settings(config, {name: end})
        if self.baseline is not None:
            with_settings(config, self.baseline)

    def config(self, params: Settings | None = None) -> Config:
        """The run that the base describes, with a trial's parameters where given."""
        return with_settings(recipe_config(self.base), params or {})

    def baseline_config(self) -> Config:
        """The run that the search is to beat."""
        return recipe_config({**self.base, **(self.baseline or {})})

    def published(self) -> dict[str, Setting]:
        """The base's own point of the space: what recipe, data set and loss were published with."""
        settings = to_settings(self.config())
        return {name: settings[name] for name in self.space}

    def first_points(self) -> list[Settings]:
        """The points to try first, those that the space has."""
        return [point for point in (self.published(), *self.points) if contains(self.space, point)]

    def fixed(self) -> dict[str, Any]:
        """Every setting that is the same in all trials, in plain types, to be written down and compared."""
        settings = to_settings(self.config())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
            if name not in self.space
        }


def variant(
    study: Study,
    *,
    dataset: str | None = None,
    trials: int | None = None,
    hours: float | None = None,
    tiny: bool = False,
    overrides: Mapping[str, Setting] | None = None,
    name: str | None = None,
    gpus_per_trial: float | None = None,
) -> Study:
    """The study as a command line asks for it: NAME, NAME-DATASET, NAME-tiny, or under a name of its own.

    Raises ConfigError for a setting that is unknown, out of range, or searched.
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
    return replace(
        study,
        name=name or default_name,
        base=base,
        trials=trials if trials is not None else TINY_TRIALS if tiny else study.trials,
        hours=hours if hours is not None else study.hours,
        gpus_per_trial=gpus_per_trial if gpus_per_trial is not None else study.gpus_per_trial,
    )
