"""Ranking and clustering, beside the bare product, pytorch-metric-learning with faiss, scikit-learn and faiss."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import faiss
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans
from torch.nn import functional as F

from hdml_core import retrieval
from hdml_core.retrieval import evaluate_retrieval, kmeans
from tests.benchmarks import Row, compare, raised_by

KS = (1, 10, 100, 1000)
CUB, SOP = (5_924, 512, 100), (60_502, 512, 11_316)
"""Rows, embedding size and classes of the test sets."""
SAME = 1e-3
"""Both sides' numbers agree to this: faiss ranks by float32, and so what lies very near may come in another order."""
WORSE = 1.005
"""At most so many times the other side's inertia is equal."""


def run(quick: bool) -> list[Row]:
    """Time the ranking at the size of both test sets, the report, and its k-means at that of the smaller."""
    size, repeats = ((400, 16, 10), 1) if quick else (CUB, 5)
    return [
        *_ranking(size, repeats),
        *_large_ranking((600, 16, 100) if quick else SOP),
        *_report(size, 1 if quick else 2),
        *_clustering(size, repeats),
    ]


def _rows(m: int, d: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(m) % classes
    z = torch.randn(classes, d, generator=random)[labels] + 4 * torch.randn(m, d, generator=random)
    return F.normalize(z, dim=1), labels


def _rank(z: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    ks = tuple(k for k in KS if k < len(z))
    return lambda: list(retrieval._score_queries(retrieval._unit_rows(z), labels, labels.bincount(), ks))


def _product(z: torch.Tensor) -> Callable[[], object]:
    """All similarities, by blocks into the same memory."""
    rows = max(1, retrieval.BLOCK // len(z))
    memory = z.new_empty(min(rows, len(z)), len(z))
    return lambda: [torch.mm(part, z.T, out=memory[: len(part)]) for part in z.split(rows)]


def _ranking(size: tuple[int, int, int], repeats: int) -> Iterator[Row]:
    z, labels = _rows(*size)
    what = f"Recall@1 to 1000, MAP@R, R-precision of {len(z):,} rows"
    yield compare(what, _rank(z, labels), "product in float32", _product(z), repeats, target=1.3)
    yield compare(what, _rank(z, labels), "product in float64", _product(z.double()), repeats)


def _large_ranking(size: tuple[int, int, int]) -> Iterator[Row]:
    """In a process of its own, to see how much memory it takes."""
    command = [sys.executable, "-m", __name__, *map(str, size)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    what = f"Recall@1 to 1000, MAP@R, R-precision of {size[0]:,} rows"
    yield Row(what, found["ranking"], "product in float32", found["product"], 1, target=1.3)
    yield Row(f"memory of it, {size[0]:,} rows", found["memory"], "the bound", 2048, 1, "MB", target=1.0)


def _report(size: tuple[int, int, int], repeats: int) -> Iterator[Row]:
    z, labels = _rows(*size)
    names = {"mean_average_precision_at_r": "map_at_r", "r_precision": "r_precision", "NMI": "nmi"}
    ours = evaluate_retrieval(z, labels, (1,), 1, 0)
    for k in ("max_bin_count", None):
        calculator = AccuracyCalculator(include=(*names, "precision_at_1"), k=k)
        theirs = calculator.get_accuracy(z, labels)
        for name, own in {
            "precision_at_1": ours.recall_at[1],
            **{n: getattr(ours, of) for n, of in names.items()},
        }.items():
            # Of two clusterings from two starts, ours may be the better one.
            if own < theirs[name] - 0.02 if name == "NMI" else abs(own - theirs[name]) > SAME:
                raise AssertionError(f"{name} must be the same on both sides, got {own} and {theirs[name]}")
        yield compare(
            f"MAP@R, R-precision, Recall@1 and NMI of {len(z):,} rows",
            lambda: evaluate_retrieval(z, labels, (1,), 1, 0),
            f"AccuracyCalculator with faiss, k = {k}",
            lambda calculator=calculator: calculator.get_accuracy(z, labels),
            repeats,
            warm_up=0,
            target=1 / 3,
        )


def _clustering(size: tuple[int, int, int], repeats: int) -> Iterator[Row]:
    z, _ = _rows(*size)
    rows, k, runs = z.numpy(), size[2], 3

    def scikit_learn() -> float:
        return float(KMeans(k, n_init=runs, random_state=0).fit(rows).inertia_)

    def of_faiss() -> float:
        found = faiss.Kmeans(size[1], k, nredo=runs, seed=0)
        found.train(rows)
        return float(found.index.search(rows, 1)[0].sum())

    best = min(_inertia(z, run) for run in kmeans(z, k, runs, 0))
    for name, theirs in (("scikit-learn", scikit_learn), ("faiss, 25 steps", of_faiss)):
        if best > WORSE * (other := theirs()):
            raise AssertionError(f"the inertia must be at most {WORSE} times that of {name}, {other}, got {best}")
        what = f"k-means of {len(z):,} rows, {k} clusters, {runs} starts"
        yield compare(what, lambda: kmeans(z, k, runs, 0), name, theirs, repeats, warm_up=0, target=1 / 3)


def _inertia(z: torch.Tensor, assignment: torch.Tensor) -> float:
    k = int(assignment.max()) + 1
    sums = torch.zeros(k, z.shape[1]).index_add_(0, assignment, z)
    means = sums / assignment.bincount(minlength=k)[:, None].clamp_min(1)
    return float((z - means[assignment]).square().sum())


if __name__ == "__main__":
    z, labels = _rows(*map(int, sys.argv[1:]))
    begin = time.perf_counter()
    memory = raised_by(_rank(z, labels))
    between = time.perf_counter()
    _product(z)()
    print(json.dumps({"ranking": between - begin, "product": time.perf_counter() - between, "memory": memory}))
