"""What a search may try of a setting, as plain declarations."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import optuna

from hdml_core.config import ConfigError, Setting


@dataclass(frozen=True)
class Uniform:
    """A real number in [low, high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self)


@dataclass(frozen=True)
class LogUniform:
    """A positive real number in [low, high], uniform in its logarithm."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self)
        if self.low <= 0:
            raise ConfigError(f"LogUniform must have low > 0, got {self.low!r}")


@dataclass(frozen=True)
class Integer:
    """A whole number in [low, high]."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self)


@dataclass(frozen=True)
class Choice:
    """One of some values without an order."""

    values: tuple[bool | int | float | str, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("Choice must have at least one value, got none")


Dimension = Uniform | LogUniform | Integer | Choice
Space = Mapping[str, Dimension]
KINDS: Mapping[str, type[Dimension]] = {kind.__name__: kind for kind in (Uniform, LogUniform, Integer, Choice)}


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Setting]:
    """Draw every setting of the space, or repeat what the trial has drawn before."""
    drawn: dict[str, Setting] = {}
    for name, dimension in space.items():
        match dimension:
            case Uniform(low, high):
                drawn[name] = trial.suggest_float(name, low, high)
            case LogUniform(low, high):
                drawn[name] = trial.suggest_float(name, low, high, log=True)
            case Integer(low, high):
                drawn[name] = trial.suggest_int(name, low, high)
            case Choice(values):
                drawn[name] = cast(Setting, trial.suggest_categorical(name, values))
    return drawn


def ends(dimension: Dimension) -> tuple[Setting, ...]:
    """The values whose validity implies that of all others."""
    return dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)


def contains(space: Space, point: Mapping[str, Setting]) -> bool:
    """Whether a search of the space could come upon the point."""
    for name, dimension in space.items():
        value = point[name]
        if isinstance(dimension, Choice):
            within = value in dimension.values
        else:
            within = isinstance(value, int | float) and dimension.low <= value <= dimension.high
        if not within:
            return False
    return True


def widens(new: Space, old: Space) -> bool:
    """Whether all that `old` may give lies in `new`, so that trials of both can stand side by side."""
    return new.keys() == old.keys() and all(_holds(new[name], old[name]) for name in new)


def to_json(space: Space) -> dict[str, dict[str, object]]:
    """The space in plain types, to be written down."""
    return {name: {"kind": type(dimension).__name__, **asdict(dimension)} for name, dimension in space.items()}


def from_json(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Dimension]:
    """The space that `to_json` wrote."""
    space: dict[str, Dimension] = {}
    for name, fields in written.items():
        of_kind: type[Dimension] = KINDS[fields["kind"]]
        values = {key: value for key, value in fields.items() if key != "kind"}
        space[name] = of_kind(**({"values": tuple(values["values"])} if of_kind is Choice else values))
    return space


def _holds(new: Dimension, old: Dimension) -> bool:
    # Optuna can't compare trials of different choices.
    if isinstance(new, Choice) or isinstance(old, Choice):
        return new == old
    return type(new) is type(old) and new.low <= old.low and old.high <= new.high


def _check_range(dimension: Uniform | LogUniform | Integer) -> None:
    low, high = dimension.low, dimension.high
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"{type(dimension).__name__} must have low < high, both finite, got ({low!r}, {high!r})")
