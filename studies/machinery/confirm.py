"""Open the test classes, once: the best trial beside its baseline, trained anew on all training classes, fresh seeds.

Searching and pruning saw validation classes only, so that what is measured here was not selected. What the study was
when it was opened (its space, data, settings and code), by whom it was compared and how often, stays in its ledger.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from hdml_core.config import Config, ConfigError, Setting, Settings, to_settings, with_settings
from studies.machinery.driver import Places, commit, execute, jobs, prepare, recording, start_ray
from studies.machinery.ledger import Ledger, LedgerError, Row, existing, open_storage
from studies.machinery.progress import table
from studies.machinery.records import QUALITIES, TEST, trial_id
from studies.machinery.search import Series
from studies.machinery.space import Choice, Integer, from_json
from studies.machinery.study import Study

BEST, BASELINE, DIFFERENCE = "best", "baseline", "difference"
GOAL = f"{TEST}/{QUALITIES[0]}"
FIRST_SEED = 10_000
"""Confirming seeds begin here, and 1,000 higher at each opening: no search has used them."""


class Interval(NamedTuple):
    """A mean with its 95 % interval by Student's t, mean +- half_width, over n seeds."""

    mean: float
    half_width: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Return mean and half width t(0.975, n - 1) s / sqrt(n); s is the sample's standard deviation.

    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    n = len(values)
    half_width = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return Interval(float(np.mean(values)), float(half_width), n)


def confirm_study(
    name: str, places: Places, seeds: int, against: str | None, again: bool, gpus_per_trial: float
) -> str:
    """Train the best trial's settings and its rival's with fresh seeds; return a table of both on the test classes.

    Also writes confirm.json beside it. Raises LedgerError where the study is unknown, has no COMPLETE trial, or was
    opened before and `again` is not said, and ConfigError where there is nothing to compare with.
    """
    if seeds < 2:
        raise ConfigError(f"--seeds must be >= 2 to give an interval, got {seeds}")
    storage = open_storage(places.ledger_url)
    ledger = existing(storage, name)
    study, data = _study(ledger, gpus_per_trial)
    best = ledger.best()
    rival, rival_data = _rival(study, data, existing(storage, against) if against else None)
    dataset = prepare(study.config(), places.root)
    for digest in {data, rival_data} - {dataset.digest}:
        raise LedgerError(f"the data have changed since they were searched: digest {digest}, now {dataset.digest}")

    frozen = {"terms": ledger.notes["terms"], "best": best.params, "rival": to_settings(rival), "commit": commit()}
    opening = _opened(ledger, again, trial_id(best.number), against or BASELINE, seeds, frozen)
    series = f"confirm-{opening['number']}"
    arms = {BEST: study.config(best.params), BASELINE: rival}
    sealed = Ledger(storage, f"{name}.{series}", {"arm": Choice((BEST, BASELINE)), "seed": Integer(0, 2**31 - 1)})
    first = FIRST_SEED + 1000 * opening["number"]
    sealed.enqueue({"arm": arm, "seed": seed} for seed in range(first, first + seeds) for arm in arms)

    def config(params: Settings) -> Config:
        return with_settings(arms[str(params["arm"])], {"seed": params["seed"]})

    with recording(places, study, ledger, dataset) as recorder:
        resources = start_ray(study)
        job = jobs("confirm", config, places, places.out / name / series, resources)
        plan = [Series("confirm", sealed, 2 * seeds, GOAL, job)]
        execute(plan, recorder, resources, places.out / name, math.inf)
        found = compare(sealed.rows())
        flat = {f"{TEST}/{quality}_{arm}": of[arm].mean for quality, of in found.items() for arm in of}
        recorder.note(series, {name: str(value) for name, value in opening.items()}, flat)
    _close(ledger, opening)
    report = {**opening, "results": {quality: {arm: of[arm]._asdict() for arm in of} for quality, of in found.items()}}
    path = places.out / name / "confirm.json"
    path.write_text(json.dumps(report, indent=2))
    return _table(found, opening) + f"\n\nwritten to {path}"


def compare(rows: Sequence[Row]) -> dict[str, dict[str, Interval]]:
    """Return for every quality the interval of each arm, and of their difference, paired by seed.

    Raises LedgerError where fewer than two seeds trained to the end in both arms.
    """
    metrics = {(row.params["arm"], row.params["seed"]): row.notes["metrics"] for row in rows if row.state == "COMPLETE"}
    seeds = sorted({seed for _, seed in metrics if (BEST, seed) in metrics and (BASELINE, seed) in metrics})
    if len(seeds) < 2:
        raise LedgerError(f"{len(seeds)} seeds trained to the end in both arms, and an interval needs 2")
    found = {}
    for quality in QUALITIES:
        values = {arm: [metrics[arm, seed][f"{TEST}/{quality}"] for seed in seeds] for arm in (BEST, BASELINE)}
        differences = [a - b for a, b in zip(values[BEST], values[BASELINE], strict=True)]
        found[quality] = {arm: interval(values[arm]) for arm in values} | {DIFFERENCE: interval(differences)}
    return found


def _study(ledger: Ledger, gpus_per_trial: float) -> tuple[Study, str]:
    """Return the study as its ledger has it, and the digest of its data."""
    terms = ledger.notes["terms"]
    study = Study(
        ledger.name,
        terms["question"],
        from_json(terms["space"]),
        base=_settings(terms["base"]),
        baseline=None if terms["baseline"] is None else _settings(terms["baseline"]),
        goal=terms["goal"],
        direction=terms["direction"],
        gpus_per_trial=gpus_per_trial,
    )
    return study, terms["data"]


def _rival(study: Study, data: str, other: Ledger | None) -> tuple[Config, str]:
    """Return what the best is compared with: the study's baseline, or the best of another study; and its data."""
    if other is not None:
        rival, rival_data = _study(other, study.gpus_per_trial)
        return rival.config(other.best().params), rival_data
    if study.baseline is None:
        raise ConfigError(f"study {study.name!r} has no baseline: name a study to compare with, --against STUDY")
    return study.baseline_config(), data


def _settings(written: Mapping[str, Any]) -> dict[str, Setting]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}


def _opened(
    ledger: Ledger, again: bool, best: str, against: str, seeds: int, frozen: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the opening that is under way, or record a new one before anything is looked at."""
    digest = hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()
    openings: list[dict[str, Any]] = ledger.notes.get("openings", [])
    asked = {"frozen": digest, "best": best, "against": against, "seeds": seeds, "commit": frozen["commit"]}
    if openings:
        last = openings[-1]
        if last["finished"] is None and asked.items() <= last.items():
            return last
        if not again:
            raise LedgerError(
                f"the test classes of study {ledger.name!r} were opened on {last['begun']}: what is selected after a "
                "look at them is not confirmed by them. --again opens them once more, and that is recorded too"
            )
    opening = {"number": len(openings) + 1, "begun": _now(), "finished": None, **asked}
    ledger.note("openings", [*openings, opening])
    return opening


def _close(ledger: Ledger, opening: dict[str, Any]) -> None:
    opening["finished"] = _now()
    ledger.note("openings", [*ledger.notes["openings"][:-1], opening])


def _table(found: Mapping[str, Mapping[str, Interval]], opening: Mapping[str, Any]) -> str:
    names = {BEST: f"best ({opening['best']})", BASELINE: opening["against"], DIFFERENCE: DIFFERENCE}
    lines = [
        [shown, *(f"{of[arm].mean:.4f} ± {of[arm].half_width:.4f}" for of in found.values())]
        for arm, shown in names.items()
    ]
    n = found[QUALITIES[0]][BEST].n
    head = f"test classes, mean and 95 % t-interval over {n} seeds, the difference paired; opening {opening['number']}"
    return f"\n{head}\n\n{table(['', *found], lines)}"


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
