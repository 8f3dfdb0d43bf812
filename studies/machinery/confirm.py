"""Open the test classes, once: the best trial beside its baseline, trained anew on all training classes, fresh seeds.

Of a study of several arms it is the best trial of each. Searching and pruning saw validation classes only, so that what
is measured here was not selected. What the study was when it was opened, by whom, and how often, stays in its ledger:
see `audit`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

import numpy as np
from scipy.stats import ttest_rel

from hdml_core.config import Config, ConfigError, Setting, to_settings, with_settings
from studies.machinery.audit import Opening, new_opening, now, opened, openings
from studies.machinery.driver import Places, commit, execute, is_shared, prepare, recording
from studies.machinery.intervals import Interval, interval, paired
from studies.machinery.lease import Lease
from studies.machinery.ledger import ATTEMPTS, CHECKPOINTS, METRICS, REASON, TERMS, Ledger, Row, existing
from studies.machinery.progress import table
from studies.machinery.records import ARM, PAPER, QUALITIES, TEST, Kind, run_name, short, trial_id
from studies.machinery.resources import Resources, start_ray
from studies.machinery.search import Series
from studies.machinery.space import Choice, Integer, Space, from_json
from studies.machinery.storage import LedgerError, open_storage
from studies.machinery.store import Store
from studies.machinery.store import opened as stored
from studies.machinery.study import MOST_SEEDS, Study
from studies.machinery.worker import Job

BEST, BASELINE, DIFFERENCE = "best", "baseline", "difference"
"""The arms of a study that has none, and what lies between them."""
SEEDS = Integer(0, 2**31 - 1)
GOAL = f"{TEST}/{QUALITIES[0]}"
FIRST_SEED = 10_000
"""How far above the search's own the seeds of an opening begin, and MOST_SEEDS higher at each opening."""
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


class Arm(NamedTuple):
    """What is trained over and over with fresh seeds, and what it is compared with."""

    config: Config
    said: str
    """Its name, to read."""
    rival: str = ""

    def difference(self, arm: str) -> str:
        """What lies between this arm, of that name, and its rival."""
        return DIFFERENCE if arm == BEST else f"{arm}-{self.rival}"


class Comparison(NamedTuple):
    """A quality of all arms, and the differences between rivals, paired by seed."""

    intervals: Mapping[str, Interval]
    """Of every arm and of every difference."""
    p_values: Mapping[str, float | None]
    """Of the paired t-test of each difference, were there none; None where all differences are equal: the test goes by
    their spread."""
    paper: Mapping[str, float]
    """The means in paper mode, where it was asked for; neither interval nor test is for them."""


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
    ledger.best()  # where there is none, nothing is opened
    return _open(_study(ledger, asked.gpus_per_trial), ledger, other, places, asked)


def close_study(study: Study, ledger: Ledger, places: Places) -> str:
    """Open the test classes as a study's last act, or go on opening them; where that is done, say what was found.

    Where trials are still to be run, or all of an arm failed, they stay closed, and that is said.
    """
    if not ledger.is_done(study.trials):
        return "the test classes stay closed until all trials have ended: the same command goes on"
    best = ledger.best_of_arms() if study.arms else {}
    if lacking := [arm for arm in study.arms if arm not in best]:
        return (
            f"the test classes stay closed, for no trial is COMPLETE of {', '.join(lacking)}: --retry-failed tries "
            f"again what failed, and python -m studies confirm {study.name} goes without"
        )
    arms = _arms(study, ledger, None)
    before = [opening for opening in openings(ledger) if opening.kind != "floor"]
    if before and before[-1].finished:
        last = before[-1]
        if (last.best, last.against) != _named(arms):
            arms = {arm: its._replace(said=arm) for arm, its in arms.items()}
        rows = Ledger(open_storage(places.ledger_url), f"{study.name}.{last.label}", {}).rows()
        said = _said(last, arms, compare(rows, arms, last.kind == "paper"), rows)
        return "\n".join([*said, f"opened on {last.begun}, of {last.best}"])
    asked = Asked(study.test_seeds, paper_mode=study.paper_mode, gpus_per_trial=study.gpus_per_trial)
    return _open(study, ledger, None, places, asked)


def _open(study: Study, ledger: Ledger, other: Ledger | None, places: Places, asked: Asked) -> str:
    storage = open_storage(places.ledger_url)
    with Lease(storage.engine, study.name) as lease:
        arms = _arms(study, ledger, other)
        digests = {}
        for arm, its in arms.items():
            dataset = prepare(its.config, places.root, is_shared(study))
            _demand_data(other if other and arm == BASELINE else ledger, dataset.digest)
            digests[arm] = dataset.digest

        opening = _opening(ledger, arms, asked)
        folder = places.out / study.name
        with recording(places, study, ledger, dataset) as recorder, opened(ledger, recorder, opening):
            space: Space = {ARM: Choice(tuple(arms)), "seed": SEEDS}
            sealed = Ledger(storage, f"{study.name}.{opening.label}", space, lease)
            first = study.config().seed + FIRST_SEED + MOST_SEEDS * opening.number
            sealed.enqueue({ARM: arm, "seed": seed} for seed in range(first, first + opening.seeds) for arm in arms)
            resources = start_ray(study)
            with stored(folder) as store:
                label = folder / opening.label
                plan = [_series(study, opening, sealed, arms, digests, places.root, label, store, resources)]
                execute(study, plan, recorder, resources, folder)
            found = compare(sealed.rows(), arms, asked.paper_mode)
            recorder.note(opening.label, opening.tags(), _metrics(found))
            (folder / "confirm.json").write_text(json.dumps(_written(opening, found), indent=2))
    lacking = [arm for arm in study.arms if arm not in arms]
    without = [f"not opened, for no trial of theirs is COMPLETE: {', '.join(lacking)}"] if lacking else []
    return "\n".join([*_said(opening, arms, found, sealed.rows()), *without, f"written to {folder / 'confirm.json'}"])


def compare(rows: Sequence[Row], arms: Mapping[str, Arm], paper_mode: bool = False) -> dict[str, Comparison]:
    """Compare the arms in every quality, each over its seeds that trained to the end, rivals over those they share.

    An arm of which fewer than two seeds did is left out, as is a difference over fewer than two. Raises LedgerError
    where that leaves nothing, or nothing of the difference that was asked for.
    """
    metrics: dict[str, dict[Any, Mapping[str, float]]] = {arm: {} for arm in arms}
    for row in rows:
        if row.state == "COMPLETE":
            metrics[str(row.params[ARM])][row.params["seed"]] = row.notes[METRICS]
    alone = arms.keys() == {BEST, BASELINE}
    most = len(metrics[BEST].keys() & metrics[BASELINE].keys()) if alone else max(map(len, metrics.values()))
    if most < 2:
        raise LedgerError(
            f"two seeds or more must have trained to the end, got {most}: {_failures(rows)}. "
            "--again opens the test classes once more"
        )
    measured = {arm: of for arm, of in metrics.items() if len(of) >= 2}
    rivals = {arm: its.rival for arm, its in arms.items() if arm in measured and its.rival in measured}

    def by_seed(name: str) -> dict[str, dict[Any, float]]:
        return {arm: {seed: of[name] for seed, of in seeds.items()} for arm, seeds in measured.items()}

    def compared(quality: str) -> Comparison:
        honest, chosen = by_seed(f"{TEST}/{quality}"), by_seed(f"{PAPER}/{quality}") if paper_mode else {}
        intervals = {arm: interval([*of.values()]) for arm, of in honest.items()}
        paper = {arm: fmean(of.values()) for arm, of in chosen.items()}
        p_values = {}
        for arm, rival in rivals.items():
            name, difference = arms[arm].difference(arm), paired(honest[arm], honest[rival])
            if difference is not None and difference.n >= 2:
                intervals[name] = difference
                p_values[name] = _p_value(honest[arm], honest[rival])
                paper |= {name: cast(Interval, paired(chosen[arm], chosen[rival])).mean} if paper_mode else {}
        return Comparison(intervals, p_values, paper)

    return {quality: compared(quality) for quality in QUALITIES}


def _p_value(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> float | None:
    """Return that of the t-test paired by seed, or None where there is no spread that it could go by."""
    a, b = ([of[seed] for seed in ours if seed in theirs] for of in (ours, theirs))
    return float(ttest_rel(a, b).pvalue) if np.ptp(np.subtract(a, b)) > ALIKE else None


def _study(ledger: Ledger, gpus_per_trial: float) -> Study:
    """Return the study as its ledger has it."""
    terms = ledger.notes[TERMS]
    return Study(
        ledger.name,
        terms["question"],
        from_json(terms["space"]),
        base=_settings(terms["base"]),
        arms={arm: _settings(settings) for arm, settings in terms.get("arms", {}).items()},
        rivals=terms.get("rivals", {}),
        trials=len(terms.get("arms", {})) or 1,  # no search follows: as many as a study of these arms may have
        baseline=None if terms["baseline"] is None else _settings(terms["baseline"]),
        goals=terms["goals"],
        gpus_per_trial=gpus_per_trial,
    )


def _settings(written: Mapping[str, Any]) -> dict[str, Setting]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}


def _arms(study: Study, ledger: Ledger, other: Ledger | None) -> dict[str, Arm]:
    """Return what is to be trained: the best trial of each arm that has one, or the best of all and its rival.

    Raises ConfigError where there is no rival.
    """
    if study.arms:
        if other is not None:
            raise ConfigError(f"--against must be left out for a study of several arms, got {other.name!r}")
        best = ledger.best_of_arms()
        return {
            arm: Arm(study.config(best[arm].params), f"{arm} ({trial_id(best[arm].number)})", study.rivals.get(arm, ""))
            for arm in study.arms
            if arm in best
        }
    best_row = ledger.best()
    said = f"best ({trial_id(best_row.number)})"
    return {BEST: Arm(study.config(best_row.params), said, BASELINE), BASELINE: _rival(study, other)}


def _rival(study: Study, other: Ledger | None) -> Arm:
    """Return what the best is compared with: the best of another study, or the study's baseline."""
    if other is not None:
        best = other.best()
        config = _study(other, study.gpus_per_trial).config(best.params)
        return Arm(config, f"{other.name} ({trial_id(best.number)})")
    if study.baseline is None:
        raise ConfigError(f"study {study.name!r} has no baseline: name a study to compare with, --against STUDY")
    return Arm(study.baseline_config(), BASELINE)


def _named(arms: Mapping[str, Arm]) -> tuple[str, str]:
    """Return what is opened for and what it is compared with; arms compared among themselves are all the former."""
    if arms.keys() == {BEST, BASELINE}:
        return arms[BEST].said, arms[BASELINE].said
    return ", ".join(its.said for its in arms.values()), ""


def _demand_data(searched: Ledger, digest: str) -> None:
    was = searched.notes[TERMS]["data"]
    if was != digest:
        raise LedgerError(
            f"study {searched.name!r} must be measured on the data that it was searched on, digest {was}, got "
            f"{digest}: put those back, or search anew with --fresh"
        )


def _opening(ledger: Ledger, arms: Mapping[str, Arm], asked: Asked) -> Opening:
    """Return the opening that was broken off, where this call is the same as then, or else a new one.

    Raises LedgerError where the test classes were opened before and `again` is not said.
    """
    before = [opening for opening in openings(ledger) if opening.kind != "floor"]
    settings = {arm: to_settings(its.config) for arm, its in arms.items()}
    kind: Kind = "paper" if asked.paper_mode else "confirm"
    new = new_opening(ledger, len(before) + 1, kind, commit(), settings, *_named(arms), asked.seeds)
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
    arms: Mapping[str, Arm],
    digests: Mapping[str, str],
    root: Path,
    folder: Path,
    store: Store | None,
    resources: Resources,
) -> Series:
    """The trainings of an opening."""

    def job(row: Row) -> Job:
        return Job(
            opening.label,
            row.number,
            row.notes[ATTEMPTS],
            to_settings(with_settings(arms[str(row.params[ARM])].config, {"seed": row.params["seed"]})),
            ({},),
            root,
            Path(row.notes.get(CHECKPOINTS, folder / trial_id(row.number))),
            resources.cpus,
            resources.gpus,
            60 * study.hang_minutes,
            digests[str(row.params[ARM])],
            store,
            processes=resources.processes,
        )

    return Series(opening.label, sealed, len(arms) * opening.seeds, [GOAL], job, max_attempts=study.max_attempts)


def _metrics(found: Mapping[str, Comparison]) -> dict[str, float]:
    """What was found, as the metrics of a run; of paper mode, under its own name, the means alone."""
    metrics = {}
    for quality, of in found.items():
        for name, its in of.intervals.items():
            metrics[f"{TEST}/{quality}_{name}"] = its.mean
            if its.half_width is not None:
                metrics[f"{TEST}/{quality}_{name}_half_width"] = its.half_width
        for name, p_value in of.p_values.items():
            if p_value is not None:
                metrics[f"{TEST}/{quality}_{name}_p_value"] = p_value
        metrics |= {f"{PAPER}/{quality}_{name}": mean for name, mean in of.paper.items()}
    return metrics


def _written(opening: Opening, found: Mapping[str, Comparison]) -> dict[str, Any]:
    """What was found, in plain types; what paper mode gave stands apart, saying what it is."""
    results = {quality: {name: its._asdict() for name, its in of.intervals.items()} for quality, of in found.items()}
    p_values = {quality: dict(of.p_values) for quality, of in found.items()}
    written = {**opening._asdict(), "finished": now(), "results": results, "p_values": p_values}
    if opening.kind == "paper":
        written["paper_mode"] = {"what": PAPER_MODE, "means": {quality: of.paper for quality, of in found.items()}}
    return written


def _said(opening: Opening, arms: Mapping[str, Arm], found: Mapping[str, Comparison], rows: Sequence[Row]) -> list[str]:
    """What was found, to read."""
    first = found[QUALITIES[0]]
    names = {arm: its.said for arm, its in arms.items()}
    names |= {its.difference(arm): its.difference(arm) for arm, its in arms.items() if its.rival}
    names = {name: said for name, said in names.items() if name in first.intervals}
    lines, below = [], []
    for name, said in names.items():
        intervals = [of.intervals[name] for of in found.values()]
        n = intervals[0].n
        fewer = "" if n == opening.seeds else f", {n} seeds"
        lines.append([said + fewer, *(f"{its.mean:.4f} ± {its.half_width:.4f}" for its in intervals)])
    for name in first.p_values:
        p_values = ["-" if of.p_values[name] is None else short(of.p_values[name]) for of in found.values()]
        lines.append([f"p of {name}, paired t-test", *p_values])
        if "-" in p_values and NO_SPREAD not in below:
            below.append(NO_SPREAD)
    if opening.kind == "paper":
        for name, said in names.items():
            lines.append([f"paper mode: {said}", *(f"{of.paper[name]:.4f}" for of in found.values())])
        below.append(PAPER_MODE)
    if any(row.state != "COMPLETE" for row in rows):
        below.append(f"left out: {_failures(rows)}")
    head = (
        f"test classes, mean and 95 % t-interval over {opening.seeds} seeds, differences paired; "
        f"opening {opening.number}"
    )
    return ["", head, "", table(["", *found], lines), "", *below]


def _failures(rows: Sequence[Row]) -> str:
    """Which trainings did not end, and why."""
    return "; ".join(
        f"{run_name('confirm', row.number, row.params)}: {row.notes.get(REASON, row.state)}"
        for row in rows
        if row.state != "COMPLETE"
    )
