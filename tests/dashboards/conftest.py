"""An MLflow database with studies as drivers leave them, made once; what is in it is in the tests to be seen."""

from types import SimpleNamespace

import mlflow
import pytest
from mlflow.entities import Metric, Param

from dashboards.runs import Tracker

SEEDS = (12000, 12001, 12002)
SMALL = {
    "data.name": "cub200",
    "data.image_size": "128",
    "data.crop_size": "128",
    "network.extractor": "mobilenet_v2",
    "network.weights": "weights.safetensors",
    "network.frozen": "all",
    "network.embedding_size": "512",
    "hdml.alpha": "90.0",
    "optim.lr_embedder": "0.001",
    "optim.epochs": "3",
    "seed": "0",
}
LARGE = {
    **SMALL,
    "data.image_size": "256",
    "data.crop_size": "227",
    "network.extractor": "googlenet",
    "network.weights": "IMAGENET1K_V1",
    "network.frozen": "",
}
# Recall@1 by seed, as a part of 1.
NPAIR, HDML, TRIPLET = (0.2350, 0.2410, 0.2380), (0.2400, 0.2430, 0.2460), (0.2250, 0.2270)
PAPER_NPAIR = (0.2500, 0.2520, 0.2540)
ALPHAS = {
    "hdml_npair": {0.0: (0.50, 0.52, 0.51, 0.53), 1.0: (0.55, 0.57, 0.56, 0.54), 100.0: (0.40, 0.44, 0.42, 0.46)},
    "hdml_triplet": {0.0: (0.48, 0.50, 0.49, 0.47), 1.0: (0.47, 0.46, 0.49, 0.50), 100.0: (0.52, 0.50, 0.51, 0.53)},
}
ABLATION = {"trained": (0.50, 0.52, 0.54), "frozen": (0.56, 0.57, 0.58), "without J_soft": (0.51, 0.50, 0.52)}


class Recorded:
    """A study as it is written down in MLflow."""

    def __init__(self, client, name, question="Why?\n\nBecause.", study_id=None, began=1, **tags):
        self.client, self.tags, self.time = client, {"study_id": study_id or name, **tags}, began
        known = client.get_experiment_by_name(name)
        self.id = known.experiment_id if known else client.create_experiment(name)
        tags = {**self.tags, "kind": "study", "mlflow.note.content": question}
        self.parent = client.create_run(self.id, began, tags, name).info.run_id

    def run(self, kind, params, metrics, state="COMPLETE", series=(), **tags):
        """A trial's run; `series` are values of part/recall_at_1, one for each epoch."""
        self.time += 1
        tags = {**self.tags, "mlflow.parentRunId": self.parent, "kind": kind, "state": state, **tags}
        run_id = self.client.create_run(self.id, self.time, tags, kind).info.run_id
        points = [Metric(name, value, self.time, 0) for name, value in metrics.items()]
        points += [Metric("part/recall_at_1", value, self.time, 10 * i) for i, value in enumerate(series, 1)]
        self.client.log_batch(run_id, points, [Param(name, value) for name, value in params.items()])
        return run_id

    def trials(self, arm, params, seconds=(), gpu=False, state="COMPLETE"):
        """Trials of a search, with their costs."""
        for number, its in enumerate(seconds):
            cost = {"cost/seconds": its, "cost/gpu_seconds": its if gpu else 0.0}
            learning = {"optim.lr_embedder": str(0.001 * (1 + number))}
            self.run("search", params | learning, {"validation/recall_at_1": 0.5, **cost}, state, arm=arm)

    def parts(self, kind, params, reached, state="COMPLETE", **tags):
        """A trial of several folds and seeds: epochs that came closer and closer to what each has reached."""
        series = [value - far for value in reached for far in (0.2, 0.1, 0.0)]
        self.run(kind, params, {"validation/recall_at_1": sum(reached) / len(reached)}, state, series, **tags)

    def opening(self, kind, arm, params, recalls, seconds=36.0, gpu=False, paper=()):
        """Trainings on the test classes, one for each seed; the other metrics follow from Recall@1."""
        for i, recall in enumerate(recalls):
            metrics = measured("test", recall) | (measured("paper", paper[i]) if paper else {})
            metrics |= {"cost/seconds": seconds, "cost/gpu_seconds": seconds if gpu else 0.0}
            self.run(kind, {**params, "seed": str(SEEDS[i])}, metrics, arm=arm)
        tags = {**self.tags, "mlflow.parentRunId": self.parent, "kind": "note"}
        self.client.create_run(self.id, self.time, tags, kind)


def measured(split, recall):
    recalls = {f"{split}/recall_at_{k}": recall + 0.1 * i for i, k in enumerate((1, 2, 4, 8))}
    return recalls | {f"{split}/nmi": recall + 0.2, f"{split}/f1": recall / 2, f"{split}/map_at_r": recall / 5}


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Where it is: `uri`, and `runs`, the folder that studies wrote to."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(uri)

    table = Recorded(client, "table_cub200", study_id="old", data_digest="0ld")
    table.opening("confirm-9", "npair", SMALL, (0.9, 0.9))
    table = Recorded(client, "table_cub200", began=1000, data_digest="1a2b3c4d5e6f")
    table.trials("npair", SMALL, (360.0, 720.0))
    table.trials("npair", SMALL, (36.0,), state="PRUNED")
    table.trials("hdml_npair", SMALL, (3600.0,))
    table.trials("triplet", SMALL, (360.0,), state="FAIL")
    table.run("floor", SMALL, measured("test", 0.2478) | {"cost/seconds": 0.0})
    table.opening("confirm-1", "npair", SMALL, (0.8, 0.8))
    table.opening("paper-2", "npair", SMALL, NPAIR, paper=PAPER_NPAIR)
    table.opening("paper-2", "hdml_npair", SMALL, HDML, paper=HDML)
    table.opening("paper-2", "triplet", SMALL, TRIPLET, paper=TRIPLET)
    table.run("paper-2", {**SMALL, "seed": str(SEEDS[2])}, {}, "FAIL", arm="triplet", reason="J_m is not finite")
    # Broken off: its end was never noted.
    table.run("paper-3", {**SMALL, "seed": "13000"}, measured("test", 0.9), arm="npair")
    table.run("paper-3", {**SMALL, "seed": "13001"}, {}, "RUNNING", arm="npair")

    large = Recorded(client, "large", began=2000, data_digest="ffffffffffff", image_side="375")
    large.trials("npair", LARGE, (1800.0,), gpu=True)
    large.opening("confirm-1", "npair", LARGE, (0.50, 0.51, 0.52), gpu=True, seconds=1800.0)
    large.opening("confirm-1", "multi_similarity", LARGE, (0.55,), gpu=True)
    alike = Recorded(client, "alike", began=3000, data_digest="1a2b3c4d5e6f")
    alike.opening("confirm-1", "lifted", {**SMALL, "network.frozen": "True"}, (0.25, 0.26, 0.27))

    drawings = {**SMALL, "data.name": "omniglot", "network.frozen": "block4"}
    omniglot = Recorded(client, "table_omniglot", began=4000)
    omniglot.opening("confirm-1", "npair", drawings, (0.83, 0.84))
    omniglot.opening("confirm-1", "hdml_npair", {**drawings, "network.embedding_size": "64"}, (0.85, 0.84))

    unnamed = Recorded(client, "unnamed", began=4600)
    unnamed.opening("confirm-1", "npair", SMALL, (0.5,))
    unnamed.run("confirm-1", SMALL, measured("test", 0.5))
    unopened = Recorded(client, "unopened", began=5000)
    unopened.trials("npair", SMALL, (1.0, 2.0))
    two = Recorded(client, "two", began=6000)
    for alpha in ("1.0", "10.0"):
        two.run("search", {**SMALL, "hdml.alpha": alpha, "optim.lr_embedder": alpha}, {"validation/recall_at_1": 0.5})
    Recorded(client, "empty", began=7000).run("search", SMALL, {}, "RUNNING")

    alpha = Recorded(client, "alpha", "How does retrieval depend on alpha?\n\nMore.", began=8000)
    for arm, by_alpha in ALPHAS.items():
        for value, parts in by_alpha.items():
            alpha.parts("search", {**SMALL, "hdml.alpha": str(value)}, parts, arm=arm)
    alpha.parts("search", {**SMALL, "hdml.alpha": "1000.0"}, (0.99,), "PRUNED", arm="hdml_npair")
    alpha.parts("search", SMALL, (0.46, 0.47, 0.48, 0.49), arm="triplet")
    alpha.parts("baseline", SMALL, (0.50, 0.51, 0.52, 0.49))
    single = Recorded(client, "single", began=9000)
    for value, reached in (("16", 0.4), ("64", 0.5)):
        single.run("search", {**SMALL, "network.embedding_size": value}, {"validation/recall_at_1": reached})

    ablation = Recorded(client, "ablation", "Which batch norm?", began=10_000)
    for arm, parts in ABLATION.items():
        ablation.parts("search", {**SMALL, "network.batch_norm": arm}, parts, arm=arm)
    opened = Recorded(client, "opened", began=11_000)
    for arm, recalls in (("npair", (0.20, 0.22)), ("hdml_npair", (0.24, 0.24))):
        opened.parts("search", SMALL, (0.5, 0.6), arm=arm)
        opened.opening("confirm-1", arm, SMALL, recalls)
    return SimpleNamespace(uri=uri, runs=folder)


@pytest.fixture(scope="session")
def tracker(store):
    return Tracker(store.uri)
