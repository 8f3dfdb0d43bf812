"""Open the test classes, once: the best trial beside its baseline, trained anew on all training classes, fresh seeds.

Searching and pruning saw validation classes only, so that what is measured here was not selected. What the study was
when it was opened, by whom, and how often, stays in its ledger: see `audit`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_rel

from hdml_core.config import Config, ConfigError, Setting, to_settings, with_settings
from studies.machinery.audit import Opening, new_opening, now, opened, openings
from studies.machinery.driver import Places, Resources, commit, execute, prepare, recording, start_ray
from studies.machinery.lease import Lease
from studies.machinery.ledger import ATTEMPTS, CHECKPOINTS, METRICS, REASON, TERMS, Ledger, Row, existing
from studies.machinery.progress import table
from studies.machinery.records import PAPER, QUALITIES, TEST, Kind, run_name, short, trial_id
from studies.machinery.search import Series
from studies.machinery.space import Choice, Integer, Space, from_json
from studies.machinery.storage import LedgerError, open_storage
from studies.machinery.study import Study
from studies.machinery.worker import Job

BEST, BASELINE, DIFFERENCE = "best", "baseline", "difference"
SPACE: Space = {"arm": Choice((BEST, BASELINE)), "seed": Integer(0, 2**31 - 1)}
"""What tells the trainings of an opening apart."""
GOAL = f"{TEST}/{QUALITIES[0]}"
FIRST_SEED, MOST_SEEDS = 10_000, 1000
"""How far above the search's own the seeds of an opening begin, and how much higher at each opening."""
ALIKE = 1e-12
"""Differences that lie no further apart are equal, but for rounding."""

PAPER_MODE = "paper mode: the test classes themselves chose the epoch, as for most published numbers; no fair measure"
NO_SPREAD = "p -: all differences are equal, and a t-test goes by their spread"


class Asked(NamedTuple):
    """An opening as a command line asks for it."""

    seeds: int = 5
    """Trainings of each arm."""
    against: str | None = None
    """A study whose best trial is the rival, instead of the baseline."""
    again: bool = False
    paper_mode: bool = False
    gpus_per_trial: float = 1.0


class Interval(NamedTuple):
    """A mean with its 95 % interval by Student's t, mean +- half_width, over n seeds."""

    mean: float
    half_width: float
    n: int


class Comparison(NamedTuple):
    """A quality of both arms over the same seeds, and its difference, paired by seed."""

    intervals: Mapping[str, Interval]
    """Of BEST, BASELINE and DIFFERENCE."""
    p_value: float | None
    """Of the paired t-test, were there no difference; None where all differences are equal: it goes by their spread."""
    paper: Mapping[str, float]
    """The three means in paper mode, where it was asked for; neither interval nor test is for them."""


def interval(values: Sequence[float]) -> Interval:
    """Return mean and half width t(0.975, n - 1) s / sqrt(n); s is the sample's standard deviation.

    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    n = len(values)
    half_width = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return Interval(float(np.mean(values)), float(half_width), n)


def confirm_study(name: str, places: Places, asked: Asked) -> str:
    """Train the best trial's settings and its rival's with fresh seeds; return a table of both on the test classes.

    Also writes confirm.json. Where it was interrupted, the same call goes on.

    Raises ConfigError for too few seeds or no rival, LeaseError where the study is at work, and LedgerError where it
    is unknown, has no COMPLETE trial, saw other data, or was opened before and `again` is not said.
    """
    if not 2 <= asked.seeds <= MOST_SEEDS:
        raise ConfigError(f"--seeds must be in [2, {MOST_SEEDS}], for an interval needs two, got {asked.seeds}")
    if asked.against == name:
        raise ConfigError(f"--against must name another study, got {name!r}: leave it out to compare with the baseline")
    storage = open_storage(places.ledger_url)
    ledger = existing(storage, name)
    other = existing(storage, asked.against) if asked.against else None
    with Lease(storage.engine, name) as lease:
        best = ledger.best()
        study = _study(ledger, asked.gpus_per_trial)
        rival, against = _rival(study, other)
        arms = {BEST: study.config(best.params), BASELINE: rival}
        for arm, searched in ((BEST, ledger), (BASELINE, other or ledger)):
            dataset = prepare(arms[arm], places.root)
            _demand_data(searched, dataset.digest)

        opening = _opening(ledger, arms, trial_id(best.number), against, asked)
        folder = places.out / name
        with recording(places, study, ledger, dataset) as recorder, opened(ledger, recorder, opening):
            sealed = Ledger(storage, f"{name}.{opening.label}", SPACE, lease)
            first = study.config().seed + FIRST_SEED + MOST_SEEDS * opening.number
            sealed.enqueue({"arm": arm, "seed": seed} for seed in range(first, first + opening.seeds) for arm in arms)
            resources = start_ray(study)
            plan = [_series(study, opening, sealed, arms, places.root, folder / opening.label, resources)]
            execute(study, plan, recorder, resources, folder)
            found = compare(sealed.rows(), asked.paper_mode)
            recorder.note(opening.label, opening.tags(), _metrics(found))
            (folder / "confirm.json").write_text(json.dumps(_written(opening, found), indent=2))
    return "\n".join([*_said(opening, found, sealed.rows()), f"written to {folder / 'confirm.json'}"])


def compare(rows: Sequence[Row], paper_mode: bool = False) -> dict[str, Comparison]:
    """Compare the arms in every quality, over the seeds that trained to the end in both.

    Raises LedgerError where these are fewer than two.
    """
    metrics = {(row.params["arm"], row.params["seed"]): row.notes[METRICS] for row in rows if row.state == "COMPLETE"}
    seeds = sorted({seed for _, seed in metrics if (BEST, seed) in metrics and (BASELINE, seed) in metrics})
    if len(seeds) < 2:
        raise LedgerError(
            f"two seeds or more must have trained to the end in both arms, got {len(seeds)}: {_failures(rows)}. "
            "--again opens the test classes once more"
        )

    def values(name: str) -> dict[str, list[float]]:
        best, baseline = ([metrics[arm, seed][name] for seed in seeds] for arm in (BEST, BASELINE))
        return {BEST: best, BASELINE: baseline, DIFFERENCE: [a - b for a, b in zip(best, baseline, strict=True)]}

    found = {}
    for quality in QUALITIES:
        honest = values(f"{TEST}/{quality}")
        spread = np.ptp(honest[DIFFERENCE])
        found[quality] = Comparison(
            {arm: interval(of) for arm, of in honest.items()},
            float(ttest_rel(honest[BEST], honest[BASELINE]).pvalue) if spread > ALIKE else None,
            {arm: fmean(of) for arm, of in values(f"{PAPER}/{quality}").items()} if paper_mode else {},
        )
    return found


def _study(ledger: Ledger, gpus_per_trial: float) -> Study:
    """Return the study as its ledger has it."""
    terms = ledger.notes[TERMS]
    return Study(
        ledger.name,
        terms["question"],
        from_json(terms["space"]),
        base=_settings(terms["base"]),
        baseline=None if terms["baseline"] is None else _settings(terms["baseline"]),
        goals=terms["goals"],
        gpus_per_trial=gpus_per_trial,
    )


def _settings(written: Mapping[str, Any]) -> dict[str, Setting]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}


def _rival(study: Study, other: Ledger | None) -> tuple[Config, str]:
    """Return what the best is compared with, and its name: the best of another study, or the study's baseline."""
    if other is not None:
        best = other.best()
        return _study(other, study.gpus_per_trial).config(best.params), f"{other.name} ({trial_id(best.number)})"
    if study.baseline is None:
        raise ConfigError(f"study {study.name!r} has no baseline: name a study to compare with, --against STUDY")
    return study.baseline_config(), BASELINE


def _demand_data(searched: Ledger, digest: str) -> None:
    was = searched.notes[TERMS]["data"]
    if was != digest:
        raise LedgerError(
            f"study {searched.name!r} must be measured on the data that it was searched on, digest {was}, got "
            f"{digest}: put those back, or search anew with --fresh"
        )


def _opening(ledger: Ledger, arms: Mapping[str, Config], best: str, against: str, asked: Asked) -> Opening:
    """Return the opening that was broken off, where this call is the same as then, or else a new one.

    Raises LedgerError where the test classes were opened before and `again` is not said.
    """
    before = [opening for opening in openings(ledger) if opening.kind != "floor"]
    settings = {arm: to_settings(config) for arm, config in arms.items()}
    kind: Kind = "paper" if asked.paper_mode else "confirm"
    new = new_opening(ledger, len(before) + 1, kind, commit(), settings, best, against, asked.seeds)
    if not before:
        return new
    last = before[-1]
    changes = [
        f"{name} was {getattr(last, name)}, is {getattr(new, name)}"
        for name in ("kind", "best", "against", "seeds", "code", "frozen")
        if getattr(last, name) != getattr(new, name)
    ]
    if not last.finished and not changes:
        return last
    if asked.again:
        return new
    broken_off = "" if last.finished else f"; that was broken off, and only the same call goes on: {', '.join(changes)}"
    raise LedgerError(
        f"the test classes of study {ledger.name!r} were opened on {last.begun} by {last.by}{broken_off}. What is "
        "selected after a look at them is not confirmed by them: --again opens them once more, and that is recorded too"
    )


def _series(
    study: Study,
    opening: Opening,
    sealed: Ledger,
    arms: Mapping[str, Config],
    root: Path,
    folder: Path,
    resources: Resources,
) -> Series:
    """The trainings of an opening."""

    def job(row: Row) -> Job:
        return Job(
            opening.label,
            row.number,
            row.notes[ATTEMPTS],
            to_settings(with_settings(arms[str(row.params["arm"])], {"seed": row.params["seed"]})),
            ({},),
            root,
            Path(row.notes.get(CHECKPOINTS, folder / trial_id(row.number))),
            resources.cpus,
            resources.gpus,
            60 * study.hang_minutes,
        )

    return Series(opening.label, sealed, 2 * opening.seeds, [GOAL], job, max_attempts=study.max_attempts)


def _metrics(found: Mapping[str, Comparison]) -> dict[str, float]:
    """What was found, as the metrics of a run; of paper mode, under its own name, the means alone."""
    metrics = {}
    for quality, of in found.items():
        for arm, its in of.intervals.items():
            metrics[f"{TEST}/{quality}_{arm}"] = its.mean
            metrics[f"{TEST}/{quality}_{arm}_half_width"] = its.half_width
        if of.p_value is not None:
            metrics[f"{TEST}/{quality}_p_value"] = of.p_value
        metrics |= {f"{PAPER}/{quality}_{arm}": mean for arm, mean in of.paper.items()}
    return metrics


def _written(opening: Opening, found: Mapping[str, Comparison]) -> dict[str, Any]:
    """What was found, in plain types; what paper mode gave stands apart, saying what it is."""
    results = {name: {arm: its._asdict() for arm, its in of.intervals.items()} for name, of in found.items()}
    p_values = {name: of.p_value for name, of in found.items()}
    written = {**opening._asdict(), "finished": now(), "results": results, "p_values": p_values}
    if opening.kind == "paper":
        written["paper_mode"] = {"what": PAPER_MODE, "means": {name: of.paper for name, of in found.items()}}
    return written


def _said(opening: Opening, found: Mapping[str, Comparison], rows: Sequence[Row]) -> list[str]:
    """What was found, to read."""
    names = {BEST: f"best ({opening.best})", BASELINE: opening.against, DIFFERENCE: DIFFERENCE}
    n = found[QUALITIES[0]].intervals[BEST].n
    lines, below = [], []
    for arm, name in names.items():
        intervals = [of.intervals[arm] for of in found.values()]
        lines.append([name, *(f"{its.mean:.4f} ± {its.half_width:.4f}" for its in intervals)])
    p_values = ["-" if of.p_value is None else short(of.p_value) for of in found.values()]
    lines.append(["p, paired t-test", *p_values])
    if "-" in p_values:
        below.append(NO_SPREAD)
    if opening.kind == "paper":
        for arm, name in names.items():
            lines.append([f"paper mode: {name}", *(f"{of.paper[arm]:.4f}" for of in found.values())])
        below.append(PAPER_MODE)
    if n < opening.seeds:
        below.append(f"left out in both arms: {_failures(rows)}")
    head = f"test classes, mean and 95 % t-interval over {n} seeds, the difference paired; opening {opening.number}"
    return ["", head, "", table(["", *found], lines), "", *below]


def _failures(rows: Sequence[Row]) -> str:
    """Which trainings did not end, and why."""
    return "; ".join(
        f"{run_name('confirm', row.number, row.params)}: {row.notes.get(REASON, row.state)}"
        for row in rows
        if row.state != "COMPLETE"
    )
