"""A comparison laid out: as a page to read, and as a CSV file to calculate with."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO

from dashboards.comparison import FLOOR, GOAL, Arm, Comparison
from dashboards.document import Page, Table
from dashboards.protocol import DIGITS, Protocol, footnotes, marked
from dashboards.published import Figure, method_name, metric_name
from studies.machinery.intervals import Interval

UNCONFIRMED = "?"
NOTHING = "–"

ABOUT = (
    "All numbers are per cent. Ours are honest, for the test classes chose neither settings nor epoch: mean ± half "
    "width of the 95 % t-interval over seeds."
)
PAPER_MODE = (
    "The test classes themselves chose the epoch, as for most published numbers: means alone, and no fair measure."
)
COST = (
    "Of tuning, trials that were given up or failed included, and of the runs on the test classes, named by the first "
    "digits of their ids. CPU h are hours of work where no GPU was used."
)
PAIRED = "Per cent, paired by seed: mean ± half width of the 95 % t-interval."
CSV_HEAD = (
    *("dataset", "method", "metric", "published_percent", "published_status", "study", "opening", "protocol"),
    *("honest_percent", "honest_half_width", "honest_seeds", "paper_mode_percent"),
    *("rival", "difference_percent", "difference_half_width", "difference_seeds", "published_difference"),
    *("tuning_trials", "gpu_hours", "cpu_hours", "run_ids"),
)


def page(of: Comparison) -> Page:
    """Lay a comparison out: honest numbers beside published ones, what is gained, paper mode, cost and runs."""
    arms = [arm for method in of.methods for arm in of.of(method)]
    trained = [arm for arm in arms if arm.method != FLOOR]
    marks = marked(arm.protocol for arm in arms)
    openings = dict.fromkeys(f"{arm.study} ({arm.opening})" for arm in trained)
    notes = footnotes(marks, bool(of.figures))
    if not all(figure.confirmed for figures in of.figures.values() for figure in figures.values()):
        notes.insert(0, f"{UNCONFIRMED} published, but unconfirmed: known second-hand alone.")
    if of.left_out:
        notes.append(f"Left out: {'; '.join(of.left_out)}.")
    return Page(
        f"{of.dataset}: published and ours",
        f"Studies and their openings: {', '.join(openings)}.",
        [
            _honest(of, marks),
            *_gains(of, trained, marks),
            *_paper_mode(of, marks),
            _costs(trained, marks),
        ],
        notes,
    )


def as_csv(of: Comparison) -> str:
    """Write a row for each method, study and metric; a method that no study has stands with what was published."""
    file = StringIO()
    writer = csv.DictWriter(file, CSV_HEAD, lineterminator="\n")
    writer.writeheader()
    for method in of.methods:
        for metric in of.metrics:
            row = {"dataset": of.dataset, "method": method, "metric": metric}
            figure = of.figures.get(method, {}).get(metric)
            if figure:
                status = "confirmed" if figure.confirmed else "unconfirmed"
                row |= {"published_percent": str(figure.percent), "published_status": status}
            writer.writerows([row | _csv_row(of, arm, metric) for arm in of.of(method)] or [row])
    return file.getvalue()


def _honest(of: Comparison, marks: Mapping[Protocol, str]) -> Table:
    rows = []
    for method in of.methods:
        lines = []
        for arm in of.of(method):
            means = [str(arm.honest(metric) or NOTHING) for metric in of.metrics]
            lines.append([_source(arm, marks), *means, str(len(arm.trainings))])
        rows += _beside_published(of, method, lines, [""])
    return Table(
        "Honest numbers beside published ones",
        ["method", "source", *map(metric_name, of.metrics), "seeds"],
        rows,
        ABOUT,
    )


def _beside_published(
    of: Comparison, method: str, lines: Sequence[Sequence[str]], rest: Sequence[str] = ()
) -> list[list[str]]:
    """Put what was published of a method above its lines, and its name before the first."""
    figures = of.figures.get(method)
    published = [["published", *(_figure(figures.get(metric)) for metric in of.metrics), *rest]] if figures else []
    names = [method_name(method), *[""] * (len(published) + len(lines) - 1)]
    return [[name, *line] for name, line in zip(names, [*published, *lines], strict=True)]


def _gains(of: Comparison, arms: Sequence[Arm], marks: Mapping[Protocol, str]) -> list[Table]:
    """Return the table of what methods gain over their rivals, where there are such."""
    rows = []
    for gain in filter(None, map(of.difference, arms)):
        names = [method_name(arm.method) for arm in (gain.arm, gain.rival)]
        both = _source(gain.arm, marks)
        if gain.arm.protocol != gain.rival.protocol:
            both += f" − {marks[gain.rival.protocol]}"
        rows.append([" − ".join(names), both, _signed(gain.ours), str(gain.ours.n), _figure(gain.published, "+")])
    head = ["difference", "source", "ours", "seeds", "published"]
    return [Table(f"{metric_name(GOAL)} gained over the loss built on", head, rows, PAIRED)] if rows else []


def _paper_mode(of: Comparison, marks: Mapping[Protocol, str]) -> list[Table]:
    """Return the table of paper mode, where some arm was measured so."""
    rows = []
    for method in of.methods:
        lines = []
        for arm in of.of(method):
            means = [arm.paper_mode(metric) for metric in of.metrics]
            if any(mean is not None for mean in means):
                cells = [NOTHING if mean is None else f"{100 * mean:.2f}" for mean in means]
                lines.append([_source(arm, marks), *cells])
        if lines:
            rows += _beside_published(of, method, lines)
    head = ["method", "source", *map(metric_name, of.metrics)]
    return [Table("Paper mode", head, rows, PAPER_MODE)] if rows else []


def _costs(arms: Sequence[Arm], marks: Mapping[Protocol, str]) -> Table:
    rows = [
        [
            method_name(arm.method),
            _source(arm, marks),
            " ".join(run.run_id[:DIGITS] for run in arm.trainings.values()),
            str(arm.tuned),
            _hours(arm),
        ]
        for arm in arms
    ]
    return Table("Cost and runs", ["method", "source", "runs", "tuning trials", "cost"], rows, COST, words=3)


def _csv_row(of: Comparison, arm: Arm, metric: str) -> dict[str, str]:
    """What an arm adds to the row of a metric."""
    row = {
        "study": arm.study,
        "opening": arm.opening,
        "protocol": str(arm.protocol),
        "tuning_trials": str(arm.tuned),
        "gpu_hours": f"{arm.gpu_hours:.4f}",
        "cpu_hours": f"{arm.cpu_hours:.4f}",
        "run_ids": " ".join(run.run_id for run in arm.trainings.values()),
        **_csv_interval("honest", arm.honest(metric)),
    }
    paper_mode = arm.paper_mode(metric)
    if paper_mode is not None:
        row["paper_mode_percent"] = f"{100 * paper_mode:.4f}"
    gain = of.difference(arm) if metric == GOAL else None
    if gain:
        row |= {"rival": gain.rival.method, **_csv_interval("difference", gain.ours)}
        if gain.published:
            row["published_difference"] = f"{gain.published.percent:.1f}"
    return row


def _csv_interval(name: str, of: Interval | None) -> dict[str, str]:
    if of is None:
        return {}
    half_width = "" if of.half_width is None else f"{100 * of.half_width:.4f}"
    return {f"{name}_percent": f"{100 * of.mean:.4f}", f"{name}_half_width": half_width, f"{name}_seeds": str(of.n)}


def _source(arm: Arm, marks: Mapping[Protocol, str]) -> str:
    return f"{arm.study} {marks[arm.protocol]}"


def _figure(figure: Figure | None, sign: str = "") -> str:
    if figure is None:
        return NOTHING
    return f"{figure.percent:{sign}.1f}".replace("-", "−") + ("" if figure.confirmed else UNCONFIRMED)


def _signed(of: Interval) -> str:
    sign = "+" if of.mean > 0 else ""
    return sign + str(of).replace("-", "−")


def _hours(arm: Arm) -> str:
    hours = ((arm.gpu_hours, "GPU h"), (arm.cpu_hours, "CPU h"))
    return " + ".join(f"{of:.2f} {unit}" for of, unit in hours if of) or NOTHING
