"""How cost grows: time and memory against tuples, classes, gallery, trials and nodes, each a log-log figure.

What is measured runs in a process of its own at each size, whose peak is then that size's: `... WHAT SIZE`.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from hdml_core import retrieval, training
from hdml_core.config import recipe_config
from tests.benchmarks import Curve, Point, raised_by
from tests.benchmarks._toys import run_driver
from tests.benchmarks.gpu import made_up
from tests.benchmarks.growth import watch

TUPLES, CLASSES, GALLERY = (16, 32, 64, 128, 256), (100, 400, 1600, 6400), (2_000, 4_000, 8_000, 16_000, 32_000)
TRIALS, NODES = (20, 40, 80, 160, 320), (1, 2, 4, 8)


def run(quick: bool) -> list[Curve]:
    """Measure each at its sizes."""
    tuples, classes, gallery, trials, nodes = (
        ((4, 8), (20, 40), (200, 400), (4, 8), (1, 2)) if quick else (TUPLES, CLASSES, GALLERY, TRIALS, NODES)
    )
    step = "step of HDML(npair), d = 512"
    return [
        Curve(f"{step}, {max(TUPLES)} classes or more", "N", [_point("tuples", n) for n in tuples]),
        Curve(f"{step}, N = 64", "classes", [_point("classes", k) for k in classes]),
        Curve("Recall@1 to 1000, MAP@R, R-precision, d = 512", "rows", [_point("gallery", m) for m in gallery]),
        Curve("driver, toys on SQLite", "trials", _of_trials(trials)),
        Curve(
            "driver, a toy for each of 2 slots a node, nodes on 2 cores", "nodes", [_of_nodes(n, 16 * n) for n in nodes]
        ),
    ]


def _point(what: str, size: int) -> Point:
    command = [sys.executable, "-m", __name__, what, str(size)]
    return Point(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def _of_trials(counts: Sequence[int]) -> list[Point]:
    """Of one driver, as its trials end."""
    with tempfile.TemporaryDirectory(prefix="curves-") as out:
        looks = watch(Path(out), max(counts))
    at = [next(look for look in looks if look.ended >= count) for count in counts]
    return [Point(count, look.clock - looks[0].clock, look.memory) for count, look in zip(counts, at, strict=True)]


def _of_nodes(nodes: int, trials: int) -> Point:
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        out = Path(folder)
        run_driver(out, "tests.benchmarks._nodes", out, nodes, trials)
        costs = json.loads((out / "costs.json").read_text())
    return Point(nodes, costs["seconds"], costs["memory"])


def _step(tuples: int, classes: int) -> Callable[[], object]:
    train = made_up((1, 1024), classes, rows=2, device=torch.device("cpu"))
    settings = {
        "data.name": "features",
        "network.embedding_size": 512,
        "optim.steps_per_epoch": 1,
        "loss.name": "npair",
    }
    run = training.new_run(recipe_config({**settings, "data.batch_size": 2 * tuples}), train)
    return lambda: training._train_epoch(run, train)


def _ranking(rows: int) -> Callable[[], object]:
    labels = torch.arange(rows) % (rows // 10)
    unit = retrieval._unit_rows(torch.randn(rows, 512))
    ks = tuple(k for k in (1, 10, 100, 1000) if k < rows)
    return lambda: list(retrieval._score_queries(unit, labels, labels.bincount(), ks))


WORK: dict[str, Callable[[int], Callable[[], object]]] = {
    "tuples": lambda n: _step(n, max(n, *TUPLES)),
    "classes": lambda k: _step(min(64, k // 2), k),
    "gallery": _ranking,
}


def main(what: str, size: int) -> None:
    """Print what some work of this size takes: the median of its times, and by how much it raises what is held."""
    work, taken = WORK[what](size), []
    megabytes = raised_by(work)
    for _ in range(3):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    print(json.dumps({"size": size, "seconds": median(taken), "megabytes": megabytes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
