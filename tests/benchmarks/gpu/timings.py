"""What a step costs, and a retrieval report, each beside a peer in the same run.

A step is one of the loop itself, from drawing its rows, which lie on the device, to the optimisers; its time is that of
an epoch, whose end waits for the device, over its steps. "float32" is torch's: convolutions may round to TF32.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from sklearn.cluster import KMeans
from torch.nn import functional as F

from hdml_core import retrieval as metrics
from hdml_core import training
from hdml_core.config import Setting, recipe_config
from tests.benchmarks import Row, compare
from tests.benchmarks.gpu import Given, Say, made_up

CASES = [(recipe, loss) for recipe in ("paper", "authors") for loss in ("npair", "triplet")]
PRECISIONS = ("float32", "bfloat16")


class Workload(NamedTuple):
    """What an extractor is given, and how much of it."""

    settings: Mapping[str, Setting]
    shape: tuple[int, ...]


def _images(extractor: str, size: int, crop: int) -> Workload:
    settings: Mapping[str, Setting] = {
        "data.name": "cub200",
        "data.image_size": size,
        "data.crop_size": crop,
        "network.extractor": extractor,
        "network.weights": "",
        "optim.channels_last": True,
    }
    return Workload(settings, (3, size, size))


WORKLOADS = {
    "features": Workload({"data.name": "features"}, (1, 1280)),
    "mobilenet_v2 96 px": _images("mobilenet_v2", 110, 96),
    "googlenet 227 px": _images("googlenet", 256, 227),
}
TOYS = {
    "features": Workload({"data.name": "features"}, (1, 32)),
    "mobilenet_v2 32 px": _images("mobilenet_v2", 36, 32),
    "googlenet 32 px": _images("googlenet", 36, 32),
}


class Case(NamedTuple):
    """Two runs to time, as settings."""

    what: str
    workload: str
    ours: Mapping[str, Setting]
    peer_name: str
    peer: Mapping[str, Setting]


def _cases(quick: bool) -> Iterator[Case]:
    """Yield what to time: what synthesis costs, what bfloat16 and the compiler save. Compiling takes longest: last."""
    workloads = TOYS if quick else WORKLOADS
    for workload, (recipe, loss), precision in product(workloads, CASES, PRECISIONS):
        if not quick or workload == "features" or (recipe, loss, precision) == (*CASES[0], "float32"):
            ours = {"recipe": recipe, "loss.name": loss, "optim.precision": precision}
            what = f"HDML({loss}) {recipe}, {workload}, {precision}"
            yield Case(what, workload, ours, loss, ours | {"synthesis": "none"})
    for workload in list(workloads)[: 1 if quick else None]:
        ours = {"optim.precision": "bfloat16"}
        yield Case(f"HDML(npair) paper, {workload}, bfloat16", workload, ours, "float32", {})
    for (recipe, loss), precision, workload in product(CASES, PRECISIONS[::-1], workloads):
        ours = {"recipe": recipe, "loss.name": loss, "optim.precision": precision}
        what = f"HDML({loss}) {recipe}, {workload}, {precision}"
        yield Case(what, workload, ours | {"optim.compile": True}, "eager; ours compiled", ours)
        if quick:
            return


def steps(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Time cases until it is time to stop; name those that were left out."""
    record |= {"rows": [], "left_out": []}
    for case in _cases(given.quick):
        if time.monotonic() > until:
            record["left_out"].append(f"{case.what}, against {case.peer_name}")
            continue
        row = _timed(case, given)
        record["rows"].append(row.record())
        say(row)
    if record["left_out"]:
        say(f"left out for want of time: {len(record['left_out'])} cases")


def _timed(case: Case, given: Given) -> Row:
    """Time epochs of both runs in turn; the row is of a step."""
    workload = (TOYS if given.quick else WORKLOADS)[case.workload]
    count, repeats, warm_up = (1, 1, 1) if given.quick else (10, 5, 2)
    batches = (12, 12) if given.quick else (128, 120)
    train = made_up(workload.shape, classes=12 if given.quick else 100, rows=4, device=given.device)
    torch.compiler.reset()  # no guard and no shape of the case before

    def epochs(settings: Mapping[str, Setting]) -> Callable[[], object]:
        config = recipe_config(
            {
                **workload.settings,
                "network.embedding_size": 128,
                "data.batch_size": batches[settings.get("loss.name") == "triplet"],
                "optim.steps_per_epoch": count,
                # The rows are made up: over hundreds of steps on them nothing shall run away.
                **{f"optim.lr_{of}": 1e-6 for of in ("extractor", "embedder", "generator", "head")},
                **settings,
            }
        )
        run = training.new_run(config, train, given.device)
        return lambda: training._train_epoch(run, train)

    fine_tunes = case.workload.startswith("googlenet") and case.peer.get("synthesis") == "none"
    target = 1.05 if fine_tunes else None
    row = compare(case.what, epochs(case.ours), case.peer_name, epochs(case.peer), repeats, warm_up, target)
    return row._replace(ours=1e3 * row.ours / count, peer=1e3 * row.peer / count, unit="ms")


def retrieval(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Time the report at the size of CUB's test set, its ranking at that of SOP's, and its clustering."""
    repeats = 1 if given.quick else 5
    cub, sop = ((400, 16, 10), (600, 16, 100)) if given.quick else ((5_924, 512, 100), (60_502, 512, 11_316))
    ks = (1, 2, 4, 8)

    def rows_of(m: int, d: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        labels = torch.arange(m) % classes
        z = torch.randn(classes, d, generator=random)[labels] + 4 * torch.randn(m, d, generator=random)
        return z.to(given.device), labels.to(given.device)

    def timed(
        what: str, ours: Callable[[], object], peer_name: str, peer: Callable[[], object], target: float | None = None
    ) -> None:
        row = compare(what, settled(ours), peer_name, settled(peer), repeats, target=target)
        record["rows"].append(row.record())
        say(row)

    def settled(work: Callable[[], object]) -> Callable[[], object]:
        def and_wait() -> None:
            work()
            if given.device.type == "cuda":
                torch.cuda.synchronize()

        return and_wait

    record["rows"] = []
    z, labels = rows_of(*cub)
    most = int(labels.bincount().max()) - 1
    timed(
        f"report of {len(z)} rows, one clustering",
        lambda: metrics.evaluate_retrieval(z, labels, ks, 1, 0),
        "float32 product and topk",
        lambda: nearest(z, most),
    )
    timed(
        f"k-means of {len(z)} rows, {cub[2]} clusters",
        lambda: metrics.kmeans(z, cub[2], 1, 0),
        "scikit-learn's on the CPU",
        lambda: KMeans(cub[2], n_init=1, random_state=0).fit(z.cpu().numpy()),
        target=1 / 3,
    )
    for rows, of_rows in ((z, labels), rows_of(*sop)):
        sizes = of_rows.bincount()
        what = f"Recall@K, MAP@R, R-precision of {len(rows)} rows"

        def ours(rows: torch.Tensor = rows, of_rows: torch.Tensor = of_rows, sizes: torch.Tensor = sizes) -> object:
            return list(metrics._score_queries(metrics._unit_rows(rows), of_rows, sizes, ks))

        timed(what, ours, "float32 product", lambda rows=rows: deque(products(rows), maxlen=0), target=1.3)
        timed(what, ours, "float32 product and topk", lambda rows=rows: nearest(rows, max(ks)))


def products(z: torch.Tensor) -> Iterator[torch.Tensor]:
    """All similarities of rows in float32, some rows at a time."""
    unit = F.normalize(z, dim=1)
    yield from (part @ unit.T for part in unit.split(4096))


def nearest(z: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The nearest rows of each row as they are usually found: in float32, in no certain order among equals."""
    return [similarity.topk(count + 1).indices for similarity in products(z)]
