"""What a study found, ready to be drawn: a curve over the one setting that it searched, or its arms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dashboards import DashboardError
from dashboards.comparison import GOAL, seed_of
from dashboards.document import Table
from dashboards.published import method_name
from dashboards.runs import StudyRuns, Tracker, TrialRun
from studies.machinery.intervals import Interval, interval, paired
from studies.machinery.records import PART, TEST, VALIDATION, short

BASELINE = "baseline"
EPOCHS = "optim.epochs"
OVER_PARTS = "95 % t-intervals over folds and seeds"
OVER_SEEDS = "95 % t-intervals over seeds"
NO_SPREAD = "one training each: no intervals"
IGNORED = ("seed", "data.fold")
"""What parts of a trial differ in."""


@dataclass(frozen=True)
class Line:
    """What is shown of an arm, or of the whole study where it has none; its name is then empty."""

    name: str
    points: tuple[tuple[float, Interval], ...]
    """(value of the setting, goal), by value."""

    @property
    def best(self) -> tuple[float, Interval]:
        """The point with the highest mean."""
        return max(self.points, key=lambda point: point[1].mean)


@dataclass(frozen=True)
class Level:
    """What does not hang on the setting: a baseline, or an arm that does not read it."""

    name: str
    goal: Interval


@dataclass(frozen=True)
class Curve:
    """A goal over a setting."""

    title: str
    goal: str
    reading: str
    """How intervals are to be read."""
    setting: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...]

    def table(self) -> Table:
        """The numbers, in per cent."""
        rows = [
            [line.name, short(value), *_cells(goal), "best" if (value, goal) == line.best else ""]
            for line in self.lines
            for value, goal in line.points
        ]
        rows += [[level.name, "any", *_cells(level.goal), ""] for level in self.levels]
        return Table(self.title, ["arm", self.setting, "mean", "half width", "n", ""], rows, words=1)


@dataclass(frozen=True)
class Dot:
    """An arm's goal, and its difference to the first arm; None of that one itself, and where nothing can be paired."""

    name: str
    goal: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Dots:
    """Arms beside each other."""

    title: str
    goal: str
    reading: str
    """How intervals are to be read."""
    dots: tuple[Dot, ...]

    def table(self) -> Table:
        """The numbers, in per cent."""
        rows = [[dot.name, *_cells(dot.goal), *_cells(dot.difference)] for dot in self.dots]
        head = ["arm", "mean", "half width", "n", f"minus {self.dots[0].name}", "half width", "n"]
        return Table(self.title, head, rows, words=1)


def found(tracker: Tracker, name: str) -> Curve | Dots:
    """Return a curve where a study searched one number, its arms where it has several.

    Raises DashboardError where it has neither, or no trial that ended.
    """
    study = tracker.study(name)
    trials = _trials(study)
    searched = _searched(trials)
    arms = list(dict.fromkeys(run.arm for run in trials if run.arm))
    if len(searched) == 1 and all(_is_number(run.params[searched[0]]) for run in trials):
        return _curve(tracker, study, searched[0], trials)
    if len(arms) > 1:
        return _dots(tracker, study, arms, trials)
    raise DashboardError(
        f"a figure is of a study with arms, or with one number that it searches; study {name!r} searches "
        f"[{', '.join(searched)}]: python -m studies show {name} lists its trials"
    )


def over_epochs(tracker: Tracker, name: str) -> Curve:
    """Return how the best trial of each arm got on, epoch by epoch. Raises DashboardError where no trial ended."""
    study = tracker.study(name)
    lines = []
    for arm, run in _best(_trials(study)).items():
        epochs = zip(*_parts(tracker, run), strict=True)
        points = tuple((float(epoch), interval(values)) for epoch, values in enumerate(epochs, 1))
        lines.append(Line(method_name(arm), points))
    return Curve(study.title, _goal(VALIDATION), _reading(OVER_PARTS, lines[0].best[1]), "epoch", tuple(lines), ())


def parts(tracker: Tracker, run: TrialRun) -> list[float]:
    """The goal of each of a trial's parts, its folds and seeds, at their last epochs."""
    return [epochs[-1] for epochs in _parts(tracker, run)]


def _parts(tracker: Tracker, run: TrialRun) -> list[list[float]]:
    """The goal of each part, epoch by epoch; a trial of a single part has told it as its own."""
    epochs = int(run.params[EPOCHS])
    told = tracker.series(run, f"{PART}/{GOAL}") or tracker.series(run, f"{VALIDATION}/{GOAL}")
    return [told[first : first + epochs] for first in range(0, len(told), epochs)]


def _trials(study: StudyRuns) -> list[TrialRun]:
    """The trials of the search that ended."""
    trials = [run for run in study.runs if run.ended and run.kind == "search"]
    if not trials:
        raise DashboardError(f"study {study.name!r} must have a trial that is COMPLETE, got none: run it")
    return trials


def _best(trials: Sequence[TrialRun]) -> dict[str, TrialRun]:
    """The trial with the best goal of each arm; without arms there is one, of no name."""
    best: dict[str, TrialRun] = {}
    for run in trials:
        arm, name = run.arm or "", f"{VALIDATION}/{GOAL}"
        if arm not in best or run.metrics[name] > best[arm].metrics[name]:
            best[arm] = run
    return best


def _searched(trials: Sequence[TrialRun]) -> list[str]:
    """The settings that differ between trials of one arm."""
    values: dict[tuple[str | None, str], set[str]] = {}
    for run in trials:
        for setting, value in run.params.items():
            values.setdefault((run.arm, setting), set()).add(value)
    return list(dict.fromkeys(name for (_, name), of in values.items() if len(of) > 1 and name not in IGNORED))


def _curve(tracker: Tracker, study: StudyRuns, setting: str, trials: Sequence[TrialRun]) -> Curve:
    reached: dict[str, dict[float, list[float]]] = {}
    for run in trials:
        of_arm = reached.setdefault(run.arm or "", {})
        value = float(run.params[setting])
        if value not in of_arm:  # drawn again, it would only be the same once more
            of_arm[value] = parts(tracker, run)
    lines, levels = [], []
    for arm, by_value in reached.items():
        points = tuple((value, interval(by_value[value])) for value in sorted(by_value))
        if len(points) > 1:
            lines.append(Line(method_name(arm), points))
        else:
            levels.append(Level(method_name(arm), points[0][1]))
    for run in study.runs:
        if run.ended and run.kind == BASELINE:
            levels.append(Level(BASELINE, interval(parts(tracker, run))))
    reading = _reading(OVER_PARTS, lines[0].best[1])
    return Curve(study.title, _goal(VALIDATION), reading, setting, tuple(lines), tuple(levels))


def _dots(tracker: Tracker, study: StudyRuns, arms: Sequence[str], trials: Sequence[TrialRun]) -> Dots:
    """Show the arms on the test classes, where they were opened; else the best trial of each on validation classes."""
    finals = [run for run in study.opened() if run.ended and run.arm in arms]
    values: dict[str, dict[int, float]] = {}
    if finals:
        split, over = TEST, OVER_SEEDS
        for arm in arms:
            values[arm] = {seed_of(run): run.metrics[f"{TEST}/{GOAL}"] for run in finals if run.arm == arm}
    else:
        split, over = VALIDATION, OVER_PARTS
        values = {arm: dict(enumerate(parts(tracker, run))) for arm, run in _best(trials).items()}
    first, *others = [(arm, of) for arm, of in values.items() if of]
    dots = [Dot(method_name(first[0]), interval([*first[1].values()]), None)]
    dots += [Dot(method_name(arm), interval([*of.values()]), paired(of, first[1])) for arm, of in others]
    return Dots(study.title, _goal(split), _reading(over, dots[0].goal), tuple(dots))


def _reading(over: str, goal: Interval) -> str:
    return over if goal.n > 1 else NO_SPREAD


def _goal(split: str) -> str:
    return f"Recall@1 on {split} classes"


def _cells(of: Interval | None) -> list[str]:
    if of is None:
        return ["", "", ""]
    half_width = "" if of.half_width is None else f"{100 * of.half_width:.2f}"
    return [f"{100 * of.mean:.2f}", half_width, str(of.n)]


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
