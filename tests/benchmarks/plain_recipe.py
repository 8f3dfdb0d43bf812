"""The whole thing against what everyone writes today: a search over alpha and beta on birds, features frozen.

Time is from the command to its end, extraction included. Everyone's recipe would take hours for a study of the size
that one is really run at: a few trials are run, and what goes before and after them counts once. The birds are the
first 80 species of CUB-200-2011, cropped, and the weights MobileNetV2's, in the folder HDML_SHARED; without them there
is nothing to measure.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from studies.machinery.intervals import interval
from tests.benchmarks import Count, Row, _birds
from tests.benchmarks._plain_recipe import Scores, Size
from tests.benchmarks._toys import run_driver

SIZE = Size((0.3, 3.0), (1.0,), folds=5, epochs=2, side=96, batch=64, embedding=512, hidden=512)
CLASSES = 80
"""Of which the first half trains, four fifths of it at a time."""
TOY = Size((0.3, 3.0), (1.0,), folds=2, epochs=1, side=32, batch=4, embedding=8, hidden=8)
WHOLE = 32
"""Trials of a study as it is really run."""
TARGET = 0.1


class Took(NamedTuple):
    """What a way of working took, in seconds, and what it came to."""

    seconds: float
    beside: float
    """Of them those before the first trial and after the last."""
    scores: Scores

    def of(self, trials: int) -> float:
        """Seconds of so many trials, by what these took."""
        return self.beside + (self.seconds - self.beside) * trials / len(self.scores.folds)


def run(quick: bool) -> list[Row | Count]:
    """Set the study beside the recipe of everyone, and beside one that caches the features too."""
    weights = _birds.SHARED / "weights/mobilenet_v2_imagenet_folded.fp16.safetensors"
    missing = [str(path) for path in (_birds.ARCHIVE, weights) if not path.is_file()]
    if missing and not quick:
        return [Count(f"left out: {' and '.join(missing)} not found", 0, "set HDML_SHARED", 0, 0)]
    with tempfile.TemporaryDirectory(prefix="plain_recipe-") as folder:
        images, size = Path(folder) / "images", TOY if quick else SIZE
        if quick:
            weights = Path(folder) / "random.safetensors"
            save_file(models.mobilenet_v2().state_dict(), weights)
            _make_up(images)
        else:
            _birds.unpack(images, CLASSES)
        took = {way: _time(Path(folder), way, images, weights, size) for way in ("study", "cached", "recipe")}
    return _rows(took, size)


def _rows(took: dict[str, Took], size: Size) -> list[Row | Count]:
    ours = took["study"]
    trials, work = len(size.points), f"{size.folds} folds, {size.epochs} epochs"
    peers = {"recipe": "what everyone writes", "cached": "the same on features cached once"}
    rows: list[Row | Count] = []
    for way, name in peers.items():
        peer = took[way]
        rows.append(Row(f"alpha and beta, {trials} trials, {work}", ours.seconds, name, peer.seconds, 1))
        what = f"alpha and beta, {WHOLE} trials, by start and time of a trial"
        target = TARGET if way == "recipe" else None
        rows.append(Row(what, ours.of(WHOLE), name, peer.of(WHOLE), 1, target=target))
    of_folds = {way: np.array(each.scores.folds).mean(0) for way, each in took.items()}
    for way, name in peers.items():
        mean, theirs = 100 * of_folds["study"].mean(), 100 * of_folds[way].mean()
        rows.append(Row("validation Recall@1, mean over trials and folds", mean, name, theirs, size.folds, "%"))
        differences = 100 * (of_folds["study"] - of_folds[way])
        better, worse = (int((sign * differences > 0).sum()) for sign in (1, -1))
        found = interval([*differences])
        note = f"in the mean by {found.mean:.2f} ± {found.half_width or 0.0:.2f} points, paired by fold"
        rows.append(Count("folds on which it is higher", better, name, worse, size.folds, note))
    return rows


def _time(folder: Path, way: str, images: Path, weights: Path, size: Size) -> Took:
    out = folder / way
    out.mkdir()
    command = (out, way, images, weights, json.dumps(size._asdict()))
    begin = time.time()
    with patch.dict(os.environ, HDML_DATA=str(out / "data")):
        run_driver(out, "tests.benchmarks._plain_recipe", *command)
    seconds = time.time() - begin
    scores = Scores(**dict(zip(Scores._fields, json.loads((out / "scores.json").read_text()), strict=True)))
    return Took(seconds, seconds - (scores.end - scores.begin), scores)


def _make_up(images: Path) -> None:
    """Noise, in classes that can't be told apart."""
    rng = np.random.default_rng(0)
    for name in range(16):
        (images / f"{name:02d}").mkdir(parents=True)
        for row in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{name:02d}/{row}.jpg")
