"""Figures of curves and of arms, to be read in print and by the colour-blind."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from dashboards.curves import Curve, Dots, Level, Line
from studies.machinery.intervals import Interval
from studies.machinery.records import short

BLACK, GREY = "#000000", "#666666"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which differ for everyone; lines differ in shape, too."""
SHAPES = "os^DvP"
DASHES = ((6, 3), (2, 2), (6, 2, 1, 2))
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "dashboards",
}
UNITS = {"loss.angle": "degrees", "data.image_size": "pixels", "data.crop_size": "pixels"}
SPREAD = 20.0
"""Values whose largest is so many times the smallest stand on a logarithmic axis, but for even steps."""
MOST_TICKS = 9
"""So many values are all written below the axis."""
ASIDE = 0.008
"""Share of the axis between lines at the same value, so that none hides another."""
MOST_BARS = 15
"""A line with more points has a band in their place, and no more than about MARKS of its shapes."""
MARKS = 8
TITLE_WIDTH = 76
BREAK = [(-0.5, -1.0), (0.5, 1.0)]
"""The stroke across an axis that is broken there."""


def draw(found: Curve | Dots, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg; return where."""
    with rc_context(STYLE):
        figure = Figure(layout="constrained", dpi=160)
        if isinstance(found, Curve):
            _draw_curve(figure, found)
        else:
            _draw_dots(figure, found)
        figure.suptitle(textwrap.fill(found.title, TITLE_WIDTH), x=0.01, ha="left", fontsize=12)
        places = [Path(f"{stem}.{ending}") for ending in ("png", "svg")]
        for place in places:
            # Without a date the same study gives the same file.
            figure.savefig(place, metadata={"Date": None} if place.suffix == ".svg" else None)
    return places


@dataclass(frozen=True)
class Scale:
    """Where values stand on an axis: logarithmic where they spread far, with 0 at its left edge."""

    values: tuple[float, ...]

    @property
    def logarithmic(self) -> bool:
        """Whether steps are ratios."""
        positive, gaps = self._positive, np.diff(self.values)
        wide = self.values[0] >= 0 and len(positive) > 1 and positive[-1] / positive[0] >= SPREAD
        return wide and not np.allclose(gaps, gaps[0])

    @property
    def broken(self) -> bool:
        """Whether 0 stands beside a logarithmic axis, which has no place for it."""
        return self.logarithmic and self.values[0] == 0

    def place(self, value: float, aside: float = 0.0) -> float:
        """Return where a value stands, or `aside` of it by a share of the axis.

        0 stands as far below the smallest other value as these are from each other, in the mean.
        """
        if not self.logarithmic:
            return value + aside * (self.values[-1] - self.values[0])
        first, last = self._positive[0], self._positive[-1]
        if value == 0:
            value = first / (last / first) ** (1 / (len(self._positive) - 1))
        return value * (last / first) ** aside

    def ticks(self) -> list[float]:
        """Return which values to write: all, if they are few; else powers of ten, none on a linear axis."""
        if len(self.values) <= MOST_TICKS:
            return [*self.values]
        if not self.logarithmic:
            return []
        first, last = (math.log10(end) for end in (self._positive[0], self._positive[-1]))
        return [0.0] * self.broken + [10.0**power for power in range(math.ceil(first), math.floor(last) + 1)]

    @property
    def _positive(self) -> list[float]:
        return [value for value in self.values if value > 0]


def _draw_curve(figure: Figure, curve: Curve) -> None:
    figure.set_size_inches(8, 5)
    axes = figure.add_subplot()
    scale = Scale(tuple(sorted({value for line in curve.lines for value, _ in line.points})))
    _lay_out(axes, scale)
    for level, dashes, colour in zip(curve.levels, cycle(DASHES), cycle((GREY, BLACK)), strict=False):
        _level(axes, level, dashes, colour)
    for i, (line, colour, shape) in enumerate(zip(curve.lines, cycle(COLOURS), cycle(SHAPES), strict=False)):
        _line(axes, scale, line, colour, shape, aside=ASIDE * (i - (len(curve.lines) - 1) / 2))
    said = ", ".join(filter(None, (UNITS.get(curve.setting), "logarithmic" if scale.logarithmic else "")))
    axes.set_xlabel(f"{curve.setting} ({said})" if said else curve.setting)
    axes.set_ylabel(f"{curve.goal} (%)")
    axes.set_title(curve.reading, loc="left", fontsize=9, color=GREY)
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=2)


def _lay_out(axes: Any, scale: Scale) -> None:
    if scale.logarithmic:
        axes.set_xscale("log")
    ticks = scale.ticks()
    if ticks:
        axes.xaxis.set_major_locator(FixedLocator([scale.place(value) for value in ticks]))
        axes.xaxis.set_major_formatter(FixedFormatter([short(value) for value in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
    if scale.broken:
        zero, first = scale.place(0.0), scale.values[1]
        for part in (0.45, 0.55):
            where = zero * (first / zero) ** part
            look = {"marker": BREAK, "markersize": 9, "color": BLACK, "clip_on": False, "linestyle": "none"}
            axes.plot([where], [0], transform=axes.get_xaxis_transform(), **look)


def _line(axes: Any, scale: Scale, line: Line, colour: str, shape: str, aside: float) -> None:
    barred = len(line.points) <= MOST_BARS
    xs = [scale.place(value, aside * barred) for value, _ in line.points]
    ys = [100 * goal.mean for _, goal in line.points]
    # The axis is broken between 0 and the rest, and so is the line.
    joined = 1 if scale.broken and line.points[0][0] == 0 else 0
    errors = _errors([goal for _, goal in line.points])
    said = ", ".join(filter(None, (line.name, f"best at {short(line.best[0])}")))
    if barred:
        axes.plot(xs[joined:], ys[joined:], color=colour, linewidth=1.6)
        axes.errorbar(xs, ys, errors, fmt=shape, color=colour, capsize=3, markersize=6, label=said)
    else:
        every = len(xs) // MARKS
        axes.plot(xs[joined:], ys[joined:], color=colour, linewidth=1.6, marker=shape, markevery=every, label=said)
        axes.fill_between(xs, np.subtract(ys, errors), np.add(ys, errors), color=colour, alpha=0.15, linewidth=0)
    best = line.points.index(line.best)
    axes.plot(xs[best], ys[best], "o", markersize=14, fillstyle="none", color=colour, markeredgewidth=1.6)


def _level(axes: Any, level: Level, dashes: Sequence[float], colour: str) -> None:
    mean, half_width = 100 * level.goal.mean, 100 * (level.goal.half_width or 0.0)
    axes.axhline(mean, color=colour, linewidth=1.6, dashes=dashes, label=level.name)
    if half_width:
        axes.axhspan(mean - half_width, mean + half_width, color=colour, alpha=0.12, linewidth=0)


def _draw_dots(figure: Figure, dots: Dots) -> None:
    paired = any(dot.difference for dot in dots.dots)
    names = [dot.name for dot in dots.dots]
    figure.set_size_inches(9 if paired else 8, 1.8 + 0.42 * len(names))
    panels = figure.subplots(1, 1 + paired, sharey=True, squeeze=False)[0]
    goals: list[tuple[str, list[Interval | None]]] = [(f"{dots.goal} (%)", [dot.goal for dot in dots.dots])]
    if paired:
        differences = [dot.difference for dot in dots.dots]
        goals.append((f"minus {names[0]}, paired\n(percentage points)", differences))
        panels[1].axvline(0, color=GREY, linewidth=1, dashes=(6, 3))
    for axes, (label, intervals) in zip(panels, goals, strict=True):
        there = [(row, of) for row, of in enumerate(intervals) if of]
        axes.errorbar(
            [100 * of.mean for _, of in there],
            [row for row, _ in there],
            xerr=_errors([of for _, of in there]),
            fmt="o",
            color=COLOURS[0],
            capsize=3,
            markersize=6,
        )
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_title(dots.reading, loc="left", fontsize=9, color=GREY)


def _errors(intervals: Sequence[Interval]) -> list[float]:
    """Half widths in per cent; none of a single value."""
    return [100 * (of.half_width or 0.0) for of in intervals]
