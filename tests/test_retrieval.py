"""Every retrieval metric equals its plain-loop float64 twin and the field's libraries, and keeps its laws."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from hdml_core import retrieval
from hdml_core.retrieval import evaluate_retrieval, kmeans, nmi, pair_f1

KS = (1, 2, 4)


def clouds(seed=0, classes=5, rows=6, d=4, spread=1.0):
    """Overlapping classes of unequal size, in float64."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.full(rows + c, c) for c in range(classes)])
    z = rng.normal(size=(classes, d))[labels] + spread * rng.normal(size=(len(labels), d))
    return torch.from_numpy(z), torch.from_numpy(labels)


def ranking(z, i):
    """All rows but i by falling cosine, equals by row; plain loops."""
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in z.tolist()]
    cosine = [sum(a * b for a, b in zip(unit[i], row, strict=True)) for row in unit]
    return sorted((j for j in range(len(unit)) if j != i), key=lambda j: (-cosine[j], j))


def loops(z, labels):
    """Recall@K, MAP@R and R-precision from their definitions, query by query."""
    labels = labels.tolist()
    recall, average_precision, precision = Counter(), [], []
    for i, label in enumerate(labels):
        hits = [labels[j] == label for j in ranking(z, i)]
        for k in KS:
            recall[k] += any(hits[:k])
        r = labels.count(label) - 1
        precision.append(sum(hits[:r]) / r)
        average_precision.append(sum(sum(hits[: p + 1]) / (p + 1) for p in range(r) if hits[p]) / r)
    m = len(labels)
    return {k: recall[k] / m for k in KS}, sum(average_precision) / m, sum(precision) / m


def loop_nmi(clusters, labels):
    m = len(labels)
    of_cluster, of_class = Counter(clusters), Counter(labels)
    both = Counter(zip(clusters, labels, strict=True))
    information = sum(n / m * math.log(n * m / (of_cluster[a] * of_class[b])) for (a, b), n in both.items())
    entropy = sum(-n / m * math.log(n / m) for counts in (of_cluster, of_class) for n in counts.values())
    return 2 * information / entropy if entropy else 1.0


def loop_f1(clusters, labels):
    m = len(labels)
    pairs = [(i, j) for i in range(m) for j in range(i)]
    hits = sum(clusters[i] == clusters[j] and labels[i] == labels[j] for i, j in pairs)
    if not hits:
        return 0.0
    precision = hits / sum(clusters[i] == clusters[j] for i, j in pairs)
    recall = hits / sum(labels[i] == labels[j] for i, j in pairs)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_plain_loops(seed):
    z, labels = clouds(seed)
    report = evaluate_retrieval(z, labels, KS, 2, seed)
    recall, map_at_r, precision = loops(z, labels)
    assert report.recall_at == pytest.approx(recall, abs=1e-10)
    assert report.map_at_r == pytest.approx(map_at_r, abs=1e-10)
    assert report.r_precision == pytest.approx(precision, abs=1e-10)
    unit = torch.nn.functional.normalize(z, dim=1)
    runs = [kmeans(unit, 5, seed + run).tolist() for run in range(2)]
    nmis = [loop_nmi(run, labels.tolist()) for run in runs]
    f1s = [loop_f1(run, labels.tolist()) for run in runs]
    assert (report.nmi, report.nmi_std) == pytest.approx((np.mean(nmis), np.std(nmis)), abs=1e-10)
    assert (report.f1, report.f1_std) == pytest.approx((np.mean(f1s), np.std(f1s)), abs=1e-10)


def test_equals_pytorch_metric_learning():
    z, labels = clouds(7, classes=6)

    def nearest(query, k, reference, ref_includes_query):
        columns = torch.tensor([ranking(z, i)[:k] for i in range(len(z))])
        return torch.zeros(columns.shape), columns

    def clusters(query, count):
        return kmeans(torch.nn.functional.normalize(z, dim=1), count, 0)

    names = ("mean_average_precision_at_r", "r_precision", "precision_at_1", "NMI")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", knn_func=nearest, kmeans_func=clusters)
    theirs = calculator.get_accuracy(z, labels)
    report = evaluate_retrieval(z, labels, KS, 1, 0)
    ours = (report.map_at_r, report.r_precision, report.recall_at[1], report.nmi)
    assert ours == pytest.approx([theirs[name] for name in names], abs=1e-10)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40))
def test_nmi_and_f1_equal_loops_and_scikit_learn(rows):
    clusters, labels = map(list, zip(*rows, strict=True))
    both = torch.tensor(clusters), torch.tensor(labels)
    assert nmi(*both) == pytest.approx(loop_nmi(clusters, labels), abs=1e-10)
    assert nmi(*both) == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert pair_f1(*both) == pytest.approx(loop_f1(clusters, labels), abs=1e-10)


@given(st.integers(0, 10_000), st.floats(0.1, 100.0))
def test_laws(seed, scale):
    z, labels = clouds(seed, spread=2.0)
    report = evaluate_retrieval(z, labels, KS, 1, 0)
    assert 0 <= report.recall_at[1] <= report.recall_at[2] <= report.recall_at[4] <= 1
    assert 0 <= report.map_at_r <= report.r_precision <= 1
    assert 0 <= report.nmi <= 1
    assert 0 <= report.f1 <= 1
    scaled = evaluate_retrieval(z * scale, labels, KS, 1, 0)
    assert scaled.recall_at == report.recall_at
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    permuted = evaluate_retrieval(z[order], labels[order], KS, 1, 0)
    assert permuted.recall_at == report.recall_at
    assert permuted.map_at_r == pytest.approx(report.map_at_r, abs=1e-12)


def test_perfect_embeddings_are_perfect():
    labels = torch.arange(5).repeat_interleave(4)
    report = evaluate_retrieval(torch.eye(5)[labels], labels, KS, 3, 0)
    assert report.recall_at[1] == report.map_at_r == report.r_precision == report.nmi == report.f1 == 1.0
    assert report.nmi_std == report.f1_std == 0.0


def test_equal_similarities_rank_by_row():
    """Of five equal rows, the first that is not the query is its nearest."""
    z, labels = torch.ones(5, 2), torch.tensor([0, 1, 0, 1, 0])
    hits, _ = retrieval.neighbour_hits(torch.nn.functional.normalize(z, dim=1), labels, 4)
    assert hits.tolist() == [
        [False, True, False, True],
        [False, False, True, False],
        [True, False, False, True],
        [False, True, False, False],
        [True, False, True, False],
    ]


@pytest.mark.parametrize("entries", [1, 37, 1 << 24])
def test_the_tile_changes_nothing(entries, monkeypatch):
    z, labels = clouds(3, classes=9)
    whole, _ = retrieval.neighbour_hits(z, labels, 8)
    monkeypatch.setattr(retrieval, "TILE_ENTRIES", entries)
    tiled, _ = retrieval.neighbour_hits(z, labels, 8)
    assert torch.equal(whole, tiled)


def test_kmeans_is_as_tight_as_scikit_learns_and_repeats():
    z, _ = clouds(1, classes=12, rows=30, d=8, spread=0.5)
    assignment = [kmeans(z, 12, seed) for seed in range(5)]
    assert torch.equal(assignment[0], kmeans(z, 12, 0))

    def inertia(a):
        return sum(float((z[a == c] - z[a == c].mean(0)).square().sum()) for c in range(12))

    ours = sorted(map(inertia, assignment))[2]
    theirs = sorted(KMeans(12, n_init=1, random_state=seed).fit(z.numpy()).inertia_ for seed in range(5))[2]
    assert ours <= 1.1 * theirs


def test_kmeans_leaves_no_cluster_empty():
    z = torch.tensor([[0.0, 1.0]] * 6 + [[1.0, 0.0]] * 2)
    assert len(kmeans(z, 4, 0).unique()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.tensor([[1.0], [math.nan], [1.0], [math.inf]])}, "must be finite, got 2 of 4 rows"),
        ({"z": torch.tensor([[1.0], [0.0], [1.0], [1.0]])}, "must not be zero.*got 1 of 4 rows"),
        ({"labels": torch.tensor([0, 0, 0, 1])}, r"2 rows or more, got one in class 1 \(1 such classes\)"),
        ({"ks": (1, 4)}, "K of Recall@K must be <= 3.*of 4 rows, got 4"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"z": torch.ones(4, 1), "labels": torch.tensor([0, 0, 1, 1]), "ks": (1,)} | change
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(**given, clusterings=1, seed=0)
