"""Every retrieval metric equals its plain-loop float64 twin and the field's libraries, and keeps its laws."""

import math
from collections import Counter
from itertools import chain, product

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
    runs = kmeans(retrieval._unit_rows(z), 5, 2, seed).tolist()
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
        return kmeans(retrieval._unit_rows(z), count, 1, 0)[0]

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


def exact_loops(unit, labels, ks):
    """Whether found at each K, average precision and R-precision of each query, ranked in whole numbers."""
    rows, labels = [[int(v * 2**26) for v in row] for row in unit.tolist()], labels.tolist()
    scores = []
    for i, label in enumerate(labels):
        nearness = [sum(a * b for a, b in zip(rows[i], row, strict=True)) for row in rows]
        order = sorted((j for j in range(len(rows)) if j != i), key=lambda j: (-nearness[j], j))
        hits = [labels[j] == label for j in order]
        r = labels.count(label) - 1
        average_precision = sum(sum(hits[: p + 1]) / (p + 1) for p in range(r) if hits[p]) / r
        scores.append(([any(hits[:k]) for k in ks], average_precision, sum(hits[:r]) / r))
    return scores


def scores(unit, labels, ks):
    parts = retrieval._score_queries(unit, labels, labels.bincount(), ks)
    return list(zip(*(torch.cat(part).tolist() for part in zip(*parts, strict=True)), strict=True))


def close_rows(seed, apart, rows=60, d=40):
    """A few directions, each of many rows that lie so far apart, with labels that have nothing to do with them."""
    random = torch.Generator().manual_seed(seed)
    few = torch.randn(4, d, generator=random, dtype=torch.float64)
    z = few[torch.randint(4, (rows,), generator=random)]
    z = z + apart * torch.randn(rows, d, generator=random, dtype=torch.float64)
    return retrieval._unit_rows(z), torch.arange(rows) % 6


@pytest.mark.parametrize("apart", [0.0, 1e-8, 1e-6, 1e-4, 1.0])
@pytest.mark.parametrize("ks", [(1, 5, 9), (1, 9, 10, 40, 59)])
def test_ranks_are_exact_also_where_float32_cannot_tell_rows_apart(apart, ks):
    for seed in range(3):
        unit, labels = close_rows(seed, apart)
        ours, exact = scores(unit, labels, ks), exact_loops(unit, labels, ks)
        assert [found for found, _, _ in ours] == [found for found, _, _ in exact]
        assert [rest for _, *rest in ours] == [pytest.approx(rest, abs=1e-14) for _, *rest in exact]


def test_float32_alone_would_rank_otherwise(monkeypatch):
    """The rows of the test above are as hard as it says: with a screen that is taken at its word, ranks are wrong."""
    unit, labels = close_rows(0, 1e-4)
    screen, exact_scores = retrieval._screen, scores(unit, labels, (1, 40))
    monkeypatch.setattr(
        retrieval, "_screen", lambda *rows: ([tile._replace(error=0.0) for tile in tiles] for tiles in screen(*rows))
    )
    assert scores(unit, labels, (1, 40)) != exact_scores


@pytest.fixture
def shortened():
    """Products in float32 of bfloat16 numbers, which torch can be told to be content with."""
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "bf16"
    yield
    products.fp32_precision = before


def test_the_screen_is_exact_where_float32_may_be_multiplied_by_shorter_numbers(shortened):
    unit, labels = close_rows(0, 1e-4)
    found = {(tile.error, tile.similarity.dtype) for tiles in retrieval._screen(unit, labels) for tile in tiles}
    assert found == {(0.0, torch.float64)}
    assert [found for found, *_ in scores(unit, labels, (1, 40))] == [
        found for found, *_ in exact_loops(unit, labels, (1, 40))
    ]


@given(st.integers(0, 10_000), st.integers(1, 3000), st.floats(0.0, 1.0))
def test_the_screen_is_off_by_no_more_than_it_says(seed, d, same):
    """Also where all products have one sign, so that errors add up most."""
    z = torch.randn(6, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = retrieval._unit_rows(z + 10 * same * z.abs().amax())
    exact = (unit @ unit.T).fill_diagonal_(-math.inf)
    for tile in chain.from_iterable(retrieval._screen(unit, torch.zeros(6, dtype=torch.long))):
        assert tile.error > 0
        off = tile.similarity.double() - exact[tile.queries]
        assert off[exact[tile.queries].isfinite()].abs().max() <= tile.error


@pytest.mark.parametrize("seed", range(3))
def test_the_tile_changes_nothing_even_where_rows_are_equal(seed, monkeypatch):
    """In float32, with most rows several times over."""
    torch.manual_seed(seed)
    z, labels = torch.randn(60, 129)[torch.randint(60, (301,))], torch.arange(301) % 20
    reports = []
    for entries, kept in product((1, 301 * 7, 301 * 64, 1 << 24), (0, 1 << 24)):
        monkeypatch.setattr(retrieval, "BLOCK", entries)
        monkeypatch.setattr(retrieval, "TILE", entries // 2)
        monkeypatch.setattr(retrieval, "KEPT", kept)
        parts = retrieval._score_queries(retrieval._unit_rows(z), labels, labels.bincount(), (1, 2, 30))
        reports.append([torch.cat(part) for part in zip(*parts, strict=True)])
    for report in reports[1:]:
        assert all(map(torch.equal, report, reports[0]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cores_change_nothing_and_are_as_many_afterwards(threads, monkeypatch):
    monkeypatch.setattr(retrieval, "TILE", 60 * 7)
    unit, labels = close_rows(0, 1e-6)
    expected, before = exact_loops(unit, labels, (1, 40)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = scores(unit, labels, (1, 40))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [found for found, *_ in ours] == [found for found, *_ in expected]
    assert [rest for _, *rest in ours] == [pytest.approx(rest, abs=1e-14) for _, *rest in expected]


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_the_scale_changes_nothing_at_the_ends_of_float32(scale):
    z, labels = clouds(5)
    plain, scaled = (evaluate_retrieval((z * s).float(), labels, KS, 1, 0) for s in (1.0, scale))
    assert scaled.recall_at == plain.recall_at
    assert scaled.map_at_r == plain.map_at_r


def test_a_collapsed_embedding_shows():
    """One cluster, which tells nothing of the classes, and the recall of a guess."""
    labels = torch.arange(40) % 4
    report = evaluate_retrieval(torch.full((40, 3), 0.1), labels, (1,), 2, 0)
    assert (report.nmi, report.nmi_std) == (0.0, 0.0)
    assert report.recall_at[1] == pytest.approx(1 / 4, abs=1 / 40)


def test_nmi_stays_within_its_bounds():
    for a in range(2, 12):
        for b in range(2, 12):
            row = torch.arange(a * b * 3)
            assert 0 <= nmi(row // (b * 3), row // 3 % b) < 1e-12
            assert nmi(row % a, (row + 1) % a) == 1


def test_kmeans_is_as_tight_as_scikit_learns_and_repeats():
    z, _ = clouds(1, classes=12, rows=30, d=8, spread=0.5)
    assignment = [kmeans(z, 12, 1, seed)[0] for seed in range(5)]
    assert torch.equal(assignment[0], kmeans(z, 12, 1, 0)[0])

    def inertia(a):
        return sum(float((z[a == c] - z[a == c].mean(0)).square().sum()) for c in range(12))

    ours = sorted(map(inertia, assignment))[2]
    theirs = sorted(KMeans(12, n_init=1, random_state=seed).fit(z.numpy()).inertia_ for seed in range(5))[2]
    assert ours <= 1.1 * theirs


def loop_kmeans(z, centres, steps):
    """Lloyd's algorithm: every row looks at every centre in every step; plain loops."""
    z, centres, assignment = z.tolist(), centres.tolist(), [0] * len(z)
    for _ in range(steps):
        far = [[sum((a - b) ** 2 for a, b in zip(row, centre, strict=True)) for centre in centres] for row in z]
        assignment = [min(range(len(centres)), key=d2.__getitem__) for d2 in far]
        of = [[row for row, c in zip(z, assignment, strict=True) if c == cluster] for cluster in range(len(centres))]
        centres = [[sum(axis) / len(rows) for axis in zip(*rows, strict=True)] for rows in of]
    return assignment


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_kmeans_equals_the_plain_loops_whether_it_keeps_what_it_measures_or_not(seed, kept, monkeypatch):
    z, _ = clouds(seed, classes=6, rows=15, spread=1.5)
    z = z - z.mean(0)
    monkeypatch.setattr(retrieval, "KEPT", kept)
    starts = z[retrieval._spread_rows(z, 6, 2, seed)]
    assert kmeans(z, 6, 2, seed).tolist() == [loop_kmeans(z, start, 100) for start in starts]


def test_kmeans_measures_only_centres_that_moved(monkeypatch):
    measured = []
    nearness = retrieval._nearness
    monkeypatch.setattr(
        retrieval, "_nearness", lambda z, centres: measured.append(len(centres)) or nearness(z, centres)
    )
    kmeans(clouds(1, classes=12, rows=30, d=8)[0], 12, 3, 0)
    assert measured[0] == 36
    assert measured[-1] < 12


def test_an_empty_cluster_takes_the_farthest_row():
    z = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    means = retrieval._means(z, torch.tensor([[0, 0, 0, 0]]), 2)
    assert means.tolist() == [[[3.0], [9.0]]]


def test_clusters_are_no_more_than_distinct_rows():
    z = torch.tensor([[0.0, 1.0]] * 6 + [[1.0, 0.0]] * 2)
    for run in kmeans(z, 4, 3, 0):
        assert len(run.unique()) == 2
        assert nmi(run, torch.tensor([0] * 6 + [1] * 2)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.tensor([[1.0], [math.nan], [1.0], [math.inf]])}, "z must be finite, got 2 of 4 rows"),
        ({"z": torch.tensor([[1.0], [0.0], [1.0], [1.0]])}, "z must have no zero row.*got 1 of 4 rows"),
        ({"labels": torch.tensor([0, 0, 0, 1])}, r"every class twice or more, got 1 with one row: \[1\]"),
        ({"labels": torch.tensor([0, 0])}, "labels must be one per row of z, got 2 for 4 rows"),
        ({"ks": (1, 4)}, r"ks must be in \[1, rows - 1 = 3\], got \(1, 4\)"),
        ({"ks": (0,)}, r"ks must be in \[1, rows - 1 = 3\], got \(0,\)"),
        ({"ks": ()}, r"ks must be in \[1, rows - 1 = 3\], got \(\)"),
        ({"clusterings": 0}, "clusterings must be >= 1, got 0"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"z": torch.ones(4, 1), "labels": torch.tensor([0, 0, 1, 1]), "ks": (1,), "clusterings": 1} | change
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(**given, seed=0)
