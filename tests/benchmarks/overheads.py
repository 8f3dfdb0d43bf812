"""What a study costs beside its training: time of its slots, between trials, before and after them, and for its record.

Trials are of glyphs, about 20 seconds on a core, on two slots.
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from hdml_core.datasets import load
from tests.benchmarks import Row
from tests.benchmarks._slots import RECORDERS, SLOTS, Work, a_study, works
from tests.benchmarks._toys import run_driver

TURNAROUND = 0.3
"""Seconds."""
SHARE = 0.01
"""Of a trial's time, at most what its record may cost."""


def run(quick: bool) -> list[Row]:
    """Run a study, beside it what starts and ends Ray Tune alone, and a study whose trials are recorded in turn."""
    with tempfile.TemporaryDirectory(prefix="overheads-") as folder:
        data = Path(folder) / "data"
        load(a_study(1, 1, 1).config().data, data)
        with patch.dict(os.environ, HDML_DATA=str(data)):
            slots = _slots(Path(folder), *((4, 1, 2) if quick else (6, 13, 0)))
            return [*slots, *_record(Path(folder), *((1, 1, 2) if quick else (8, 2, 0)))]


def _slots(folder: Path, trials: int, epochs: int, steps: int) -> Iterator[Row]:
    begin, done, end = _timed(folder / "study", "study", trials, epochs, steps)
    plain_begin, plain, plain_end = _timed(folder / "plain", "plain", SLOTS, 1, 1)
    training = sum(work.training for work in done)
    slots = _by_worker(done)
    at_work = sum(of[-1].end - of[0].begin for of in slots)
    between = [after.begin - before.end for of in slots for before, after in pairwise(of)]
    beside, plain_beside = (
        min(work.begin for work in of) - start + stop - max(work.end for work in of)
        for start, of, stop in ((begin, done, end), (plain_begin, plain, plain_end))
    )
    what = f"{SLOTS} slots, {trials} trials of {epochs} epochs"
    next_one = "a trial's last report until the next one's first work"
    own, bound = "of their training", "the bound"
    whole = f"{what}, from the command to its end"
    yield Row(f"{what}, while they have trials", at_work, own, training, 1, target=1 / 0.9)
    yield Row(next_one, statistics.median(between), bound, TURNAROUND, len(between), target=1)
    yield Row(whole, SLOTS * (end - begin), own, training, 1)
    yield Row("before a study's first work and after its last", beside, "of Ray Tune alone", plain_beside, 1)


def _record(folder: Path, turns: int, epochs: int, steps: int) -> Iterator[Row]:
    out = folder / "recorded"
    _, done, _ = _timed(out, "recorded", len(RECORDERS) * turns, epochs, steps)
    waited, processor = (list(each.values()) for each in json.loads((out / "borne.json").read_text()))
    times = [work.end - work.begin for work in done]

    def median(of_trials: Sequence[float], recorder: str) -> float:
        return statistics.median(of_trials[RECORDERS.index(recorder) :: len(RECORDERS)])

    bare, bare_processor = (median(each, "none") for each in (times, processor))
    for recorder in RECORDERS[1:]:
        under = f"a point a step, MLflow on {recorder}"
        without = "without a recorder"
        yield Row(f"a trial, {under}", median(times, recorder), without, bare, turns, target=1 + SHARE)
        wait = median(waited, recorder)
        yield Row(f"its wait for the record, {under}", wait, f"{SHARE:.0%} of it", SHARE * bare, turns, target=1)
        yield Row(f"the driver's processor, {under}", median(processor, recorder), without, bare_processor, turns)


def _timed(out: Path, how: str, trials: int, epochs: int, steps: int) -> tuple[float, list[Work], float]:
    """When a driver began, what its trials were at, and when it ended."""
    out.mkdir()
    begin = time.time()
    run_driver(out, "tests.benchmarks._slots", out, how, trials, epochs, steps)
    return begin, list(works(out).values()), time.time()


def _by_worker(done: Sequence[Work]) -> list[list[Work]]:
    """The trials of each worker in their order."""
    found: dict[int, list[Work]] = defaultdict(list)
    for work in sorted(done, key=lambda work: work.begin):
        found[work.worker].append(work)
    return [*found.values()]
