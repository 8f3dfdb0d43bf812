"""What a study says on the terminal: a line for every trial that ended, a bar, a table at the end."""

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from studies.machinery.ledger import METRICS, PRICE, REASON, Ledger, Row, spent
from studies.machinery.records import ARM, QUALITIES, TEST, VALIDATION, Kind, describe, run_name, short, trial_id
from studies.machinery.space import Space
from studies.machinery.study import Study


class Progress:
    """A live bar where the terminal is one, and a line for each trial that ended."""

    def __init__(self, done: int, total: int, goal: str) -> None:
        self._bar = tqdm(total=total, initial=done, unit="trial", disable=None, leave=False)
        self._goal = goal.rpartition("/")[2]

    def ended(self, kind: Kind, row: Row) -> None:
        """Say how a trial ended."""
        said = f"{self._goal} {row.value:.4f}" if row.value is not None else row.notes.get(REASON, "")
        self._bar.write(
            f"{run_name(kind, row.number, row.params):<34} {row.state:<8} {row.seconds:6.1f} s  {said}",
            file=sys.stdout,
        )
        self._bar.update()

    def crashed(self, kind: Kind, number: int, reason: str) -> None:
        """Say that a trial has to be tried again, and why."""
        name = trial_id(number) if kind == "search" else f"{kind} {trial_id(number)}"
        self._bar.write(f"{name}: to be tried again: {reason}", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def summary(study: Study, ledgers: Mapping[Kind, Ledger], tracking_uri: str, out: Path) -> str:
    """The end of a study: what was found, where to look, what to run next."""
    rows = ledgers["search"].rows()
    named: dict[str, Row | None] = {
        kind: next(iter(ledgers[kind].rows()), None) for kind in ("floor", "baseline") if kind in ledgers
    }
    complete = bool(ledgers["search"].ranked())
    if study.arms:
        best = ledgers["search"].best_of_arms()
        named |= {arm: best.get(arm) for arm in study.arms}
    else:
        named["published point"] = next((row for row in rows if row.params in study.published()), None)
        named["best"] = ledgers["search"].best() if complete else None
    # Arms read few of the settings each: they are told in a cell, not in a column for every setting.
    parts = ["settings"] if study.arms else [name.rpartition(".")[2] for name in study.space]
    cells = _settings_of_arm if study.arms else functools.partial(_settings, study.space)
    lines = [
        [name, trial_id(row.number) if row.params else "", *cells(row), *_qualities(row), row.state]
        for name, row in named.items()
        if row is not None
    ]
    said = ["", table(["", "trial", *parts, *QUALITIES, "state"], lines), ""]
    floor = named.get("floor")
    if floor is not None and floor.state == "COMPLETE":
        recall = floor.notes[METRICS][f"{TEST}/{QUALITIES[0]}"]
        said.append(f"floor on the test classes: {QUALITIES[0]} {recall:.4f}")
    said.append(f"{len(rows)} of {study.trials} trials: {states(rows)}")
    if len(study.goals) > 1:
        said.append("Pareto front: " + ", ".join(trial_id(row.number) for row in ledgers["search"].front()))
    said += spending(ledgers.values())
    elsewhere = "" if out == Path("runs").absolute() else f" --out {os.path.relpath(out)}"
    said.append(f"look:  {look(tracking_uri)}   (experiment {study.name})")
    if complete and not study.test_seeds:
        said.append(f"next:  {command('python')} -m studies confirm {study.name}{elsewhere}")
    return "\n".join(said)


def states(rows: Sequence[Row]) -> str:
    """How many trials are in each state."""
    return ", ".join(f"{n} {state}" for state, n in Counter(row.state for row in rows).items()) or "none"


def spending(ledgers: Iterable[Ledger]) -> list[str]:
    """What a study has spent, in all, for each trial, and for each point of its first goal gained over its baseline.

    A point is a hundredth of the goal. The search comes last of the ledgers, the baseline before it.
    """
    *before, search = ledgers
    rows = [row for ledger in (*before, search) for row in ledger.rows()]
    seconds, gpu_seconds = spent(rows)
    if not seconds:
        return []
    price = search.notes.get(PRICE, 0.0)
    points = _gain(before, search)

    def share(of: float, what: str) -> str:
        money = f", cost {price * seconds / 3600 / of:.2f}" if price else ""
        return f"{what} {seconds / 3600 / of:.3f} h of work, {gpu_seconds / 3600 / of:.3f} GPU-h{money}"

    said = ["spent: " + share(1, "in all") + "; " + share(len(rows), "each trial")]
    if points > 0:
        said[0] += "; " + share(points, "each point gained")
    return said


def _gain(before: Sequence[Ledger], search: Ledger) -> float:
    """Points that the best trial is ahead of the best of what came before the search; 0 where there is none."""
    rivals = [ledger.ranked()[0].values[0] for ledger in before if ledger.ranked()]
    best = [row.values[0] for row in search.ranked()[:1]]
    return 100 * (best[0] - max(rivals)) if best and rivals else 0.0


def _settings(space: Space, row: Row) -> list[str]:
    return [short(row.params[name]) if name in row.params else "" for name in space]


def _settings_of_arm(row: Row) -> list[str]:
    return [describe({name: value for name, value in row.params.items() if name != ARM})]


def _qualities(row: Row) -> list[str]:
    metrics = row.notes.get(METRICS, {})
    found = [metrics.get(f"{VALIDATION}/{name}") for name in QUALITIES]
    return ["" if value is None else f"{value:.4f}" for value in found]


def look(tracking_uri: str) -> str:
    """Where MLflow's pages are, or the command that shows them."""
    if tracking_uri.startswith(("http:", "https:")):
        return tracking_uri
    database, _, path = tracking_uri.partition(":///")
    shown = f"{database}:///{os.path.relpath(path)}" if database == "sqlite" else tracking_uri
    return f"{command('mlflow')} ui --backend-store-uri {shown}"


def command(name: str) -> str:
    """A program of this Python's own, as a shell here finds it."""
    return os.path.relpath(Path(sys.executable).with_name(name))


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the rest to the right.

    >>> print(table(["", "recall"], [["best", "0.41"]]))
          recall
    best    0.41
    """
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
