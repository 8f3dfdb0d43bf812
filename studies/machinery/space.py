"""What a search may try of a setting, as plain declarations.

A setting with a `when` is searched only where the choices named there, which stand before it, were drawn as it says:
as one value, or as any of several.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from optuna.trial import BaseTrial

from hdml_core.config import ConfigError, Setting, Settings
from studies.machinery.records import ARM

Conditions = Mapping[str, Setting | tuple[str, ...]]
"""A value, or several of which one has to be, of each of some settings."""


@dataclass(frozen=True)
class Uniform:
    """A real number in [low, high]."""

    low: float
    high: float
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_range(self)


@dataclass(frozen=True)
class LogUniform:
    """A positive real number in [low, high], uniform in its logarithm."""

    low: float
    high: float
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_range(self)
        if self.low <= 0:
            raise ConfigError(f"LogUniform must have low > 0, got {self.low!r}")


@dataclass(frozen=True)
class Integer:
    """A whole number in [low, high]."""

    low: int
    high: int
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_range(self)


@dataclass(frozen=True)
class Choice:
    """One of some values without an order."""

    values: tuple[bool | int | float | str, ...]
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("Choice must have at least one value, got none")


Dimension = Uniform | LogUniform | Integer | Choice
Space = Mapping[str, Dimension]
KINDS: Mapping[str, type[Dimension]] = {kind.__name__: kind for kind in (Uniform, LogUniform, Integer, Choice)}


def check_space(space: Space) -> None:
    """Raise ConfigError where a `when` asks for what no search of the space meets."""
    earlier: dict[str, Dimension] = {}
    for name, dimension in space.items():
        for condition, value in (
            (name, value) for name, values in dimension.when.items() for value in _several(values)
        ):
            if condition not in earlier:
                raise ConfigError(
                    f"{name} is searched when {condition} is {value!r}, which must be searched before it: "
                    f"before it stand [{', '.join(earlier)}]"
                )
            if not isinstance(earlier[condition], Choice | Integer) or not _holds(earlier[condition], value):
                raise ConfigError(
                    f"{name} is searched when {condition} is {value!r}, which must be a value that a Choice or an "
                    f"Integer takes: {condition} is {earlier[condition]}"
                )
        earlier[name] = dimension


def suggest(trial: BaseTrial, space: Space) -> dict[str, Setting]:
    """Draw every setting that is active in the space, or repeat what the trial has drawn before."""
    drawn: dict[str, Setting] = {}
    for name, dimension in space.items():
        if not is_active(dimension, drawn):
            continue
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


def is_active(dimension: Dimension, drawn: Settings) -> bool:
    """Whether the setting is searched, what was drawn before it being this."""
    return all(name in drawn and drawn[name] in _several(values) for name, values in dimension.when.items())


def met(dimension: Dimension) -> dict[str, Setting]:
    """Values that meet the dimension's conditions, the first of several."""
    return {name: _several(values)[0] for name, values in dimension.when.items()}


def of_arm(space: Space, arm: str) -> Space:
    """What is searched of one arm, as a space of its own."""
    return {
        name: replace(dimension, when={given: values for given, values in dimension.when.items() if given != ARM})
        for name, dimension in space.items()
        if name != ARM and (ARM not in dimension.when or arm in _several(dimension.when[ARM]))
    }


def ends(dimension: Dimension) -> tuple[Setting, ...]:
    """The values whose validity implies that of all others."""
    return dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)


def active(space: Space, point: Settings) -> dict[str, Setting]:
    """What of a point is searched: without the settings that are not in the space, or not active at the point."""
    searched: dict[str, Setting] = {}
    for name, dimension in space.items():
        if name in point and is_active(dimension, searched):
            searched[name] = point[name]
    return searched


def contains(space: Space, point: Settings) -> bool:
    """Whether a search of the space could come upon the point; settings that are not active at it do not matter."""
    searched = active(space, point)
    return all(
        name in searched and _holds(dimension, searched[name])
        for name, dimension in space.items()
        if is_active(dimension, searched)
    )


def quantile(dimension: Dimension, share: float) -> Setting:
    """The value that a share in [0, 1] of the dimension lies below: its low end at 0, its high end at 1."""
    match dimension:
        case Uniform(low, high):
            value = low * (1 - share) + high * share
        case LogUniform(low, high):
            value = low ** (1 - share) * high**share
        case Integer(low, high):
            value = low + int(share * (high - low + 1))
        case Choice(values):
            return values[min(int(share * len(values)), len(values) - 1)]
    return min(max(value, low), high)  # rounding may lead out by a hair


def widens(new: Space, old: Space) -> bool:
    """Whether all that `old` may give lies in `new`, so that trials of both can stand side by side."""
    return new.keys() == old.keys() and all(_widens(new[name], old[name]) for name in new)


def to_json(space: Space) -> dict[str, dict[str, object]]:
    """The space in plain types, to be written down."""
    return {name: {"kind": type(dimension).__name__, **asdict(dimension)} for name, dimension in space.items()}


def from_json(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Dimension]:
    """The space that `to_json` wrote."""
    space: dict[str, Dimension] = {}
    for name, fields in written.items():
        of_kind: type[Dimension] = KINDS[fields["kind"]]
        declared: dict[str, Any] = {key: value for key, value in fields.items() if key != "kind"}
        if of_kind is Choice:
            declared["values"] = tuple(declared["values"])
        declared["when"] = {
            condition: tuple(value) if isinstance(value, list) else value
            for condition, value in declared["when"].items()
        }
        space[name] = of_kind(**declared)
    return space


def _holds(dimension: Dimension, value: Setting) -> bool:
    match dimension:
        case Choice(values):
            return value in values
        case Integer(low, high):
            return isinstance(value, int) and low <= value <= high
        case _:
            return isinstance(value, int | float) and dimension.low <= value <= dimension.high


def _several(values: Setting | tuple[str, ...]) -> tuple[Setting, ...]:
    return values if isinstance(values, tuple) else (values,)


def _widens(new: Dimension, old: Dimension) -> bool:
    # Optuna can't compare trials of different choices.
    if isinstance(new, Choice) or isinstance(old, Choice):
        return new == old
    return type(new) is type(old) and new.when == old.when and new.low <= old.low and old.high <= new.high


def _check_range(dimension: Uniform | LogUniform | Integer) -> None:
    low, high = dimension.low, dimension.high
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"{type(dimension).__name__} must have low < high, both finite, got ({low!r}, {high!r})")
