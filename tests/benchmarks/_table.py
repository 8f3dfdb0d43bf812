"""What several runs of the benchmarks came to, as one table: each figure by the run whose ratio is the middle one."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from dashboards.drawing import COLOURS, STYLE

HEADER = ("figure", "ours", "peer or floor", "ratio", "target", "met")


def middle(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each figure the record of the run that is in the middle by ratio, or by count, with the others' beside it.

    Raises ValueError where the runs have not the same figures.
    """
    figures = [[(row["what"], row.get("peer_name")) for row in rows] for rows in runs]
    if any(of_run != figures[0] for of_run in figures):
        raise ValueError(f"every run must have the same figures, got {figures}")
    found = []
    for of_figure in zip(*runs, strict=True):
        ordered = sorted(of_figure, key=_size)
        found.append(ordered[len(ordered) // 2] | {"of_runs": [_size(row) for row in of_figure]})
    return found


def _size(row: dict[str, Any]) -> float:
    if "exponents" in row:
        return float(row["exponents"][0])
    return float(row["ratio"] if "ratio" in row else row["ours"])


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of all benchmarks that left one in a folder, by name."""
    for path in sorted(folder.glob("*.json")):
        if path.stem != "gpu":
            yield json.loads(path.read_text())


def draw(row: dict[str, Any], stem: Path) -> None:
    """Write a curve as STEM.png and STEM.svg, both axes logarithmic."""
    size, *costs = zip(*(point.values() for point in row["points"]), strict=True)
    with rc_context(STYLE):
        figure = Figure((8, 3.4), layout="constrained", dpi=160)
        panels = figure.subplots(1, 2)
        for axes, name, values, exponent, colour in zip(
            panels, ("time, s", "memory, MB"), costs, row["exponents"], COLOURS, strict=False
        ):
            axes.loglog(size, values, "o-", color=colour, base=10)
            axes.set(xlabel=row["against"], title=f"{name}: ∝ size^{exponent:.2f}")
            axes.xaxis.set_major_locator(FixedLocator(size))
            axes.xaxis.set_major_formatter(FixedFormatter([f"{value:,}" for value in size]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(visible=True, which="major", alpha=0.3)
        figure.suptitle(row["what"], x=0.01, ha="left", fontsize=12)
        for ending in ("png", "svg"):
            # Without a date the same numbers give the same file.
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(stem.with_suffix(f".{ending}"), metadata=metadata)


def table(records: Iterable[dict[str, Any]], judged: bool = False) -> str:
    """The table in Markdown; `judged`: without the figures that have no target, which are there to be seen."""
    rows = [row for record in records for row in record["rows"] if not judged or row.get("target") is not None]
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "exponents" in row:
        time, memory = row["exponents"]
        return row["what"], f"time ∝ {row['against']}^{time:.2f}, memory ^{memory:.2f}", "", "", "", ""
    if "ratio" not in row:
        return row["what"], str(row["ours"]), f"{row['peer']} ({row['peer_name']})", "", "", ""
    ours, peer = (f"{float(f'{row[side]:.3g}'):,g} {row['unit']}" for side in ("ours", "peer"))
    target = row["target"]
    judged = ("", "") if target is None else (f"≤ {target:.3g}", "yes" if row["ratio"] <= target else "**no**")
    return row["what"], ours, f"{peer} ({row['peer_name']})", f"{row['ratio']:.3g}", *judged
