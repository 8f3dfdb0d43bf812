"""How well embeddings retrieve their class: Recall@K, MAP@R and R-precision; NMI and F1 of a clustering.

Rows are compared on the unit sphere, where the largest inner product is the smallest Euclidean distance. Neighbours
are exact: the components of the unit rows are rounded to multiples of 2^-26, about what float32 resolves, and what
decides a rank is multiplied in float64. Every product and every partial sum is then a multiple of 2^-52 below 2, which
float64 holds without rounding, so a similarity is the same number in whatever order a device sums it: equal rows tie
exactly, and neither the tile nor the device has a say in the ranking. Ties go to the lower row.

On a CPU a product in float32, of which it is known how far it is off at most, goes before; only what it leaves open is
multiplied in float64.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hdml_core.notation import RetrievalReport

BLOCK, TILE = 2**24, 2**21
"""Entries of a matrix that are multiplied at once, 128 MiB in float64, and how many of those a CPU looks at at once, to
have them in cache; neighbours depend on neither."""

KEPT = 2**27
"""Entries of a matrix, 512 MiB in float32, up to which all similarities are held, and what k-means measures is kept."""

LLOYD_STEPS = 100
"""k-means stops when no row changes its cluster, and after as many steps in any case."""


@torch.no_grad()
def evaluate_retrieval(
    z: Float[Tensor, "m d"], labels: Int[Tensor, " n"], ks: tuple[int, ...], clusterings: int, seed: int
) -> RetrievalReport:
    """Measure how well the rows of `z`, each a query to all the others, retrieve their class.

    With R the number of other rows of a query's class, and P(i) the share of its class among its i nearest:

        Recall@K     whether any of the K nearest is of its class
        R-precision  P(R)
        MAP@R        1/R sum over those i <= R whose row is of its class of P(i)

    each a mean over the queries (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020). NMI and F1
    compare the classes with `clusterings` runs of k-means of as many clusters; their mean and their population
    standard deviation are reported. Labels may be any whole numbers.

    Raises ValueError where `z` has rows that are zero or not finite, `labels` is not one per row, a class has a single
    row, a K is not in [1, m - 1], or there is no clustering to do.
    """
    if len(labels) != len(z):
        raise ValueError(f"labels must be one per row of z, got {len(labels)} for {len(z)} rows")
    unit = _unit_rows(z)
    classes, of_class, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    if single := classes[sizes == 1].tolist():
        raise ValueError(f"labels must name every class twice or more, got {len(single)} with one row: {single[:10]}")
    if not ks or not all(1 <= k < len(z) for k in ks):
        raise ValueError(f"ks must be in [1, rows - 1 = {len(z) - 1}], got {ks}")
    if clusterings < 1:
        raise ValueError(f"clusterings must be >= 1, got {clusterings}")

    found, average_precision, r_precision = map(torch.cat, zip(*_score_queries(unit, of_class, sizes, ks), strict=True))
    runs = kmeans(unit.to(torch.promote_types(z.dtype, torch.float32)), len(sizes), clusterings, seed)
    nmis, f1s = [nmi(run, of_class) for run in runs], [pair_f1(run, of_class) for run in runs]
    return RetrievalReport(
        recall_at=dict(zip(ks, found.double().mean(0).tolist(), strict=True)),
        map_at_r=average_precision.mean().item(),
        r_precision=r_precision.mean().item(),
        nmi=statistics.fmean(nmis),
        nmi_std=statistics.pstdev(nmis),
        f1=statistics.fmean(f1s),
        f1_std=statistics.pstdev(f1s),
    )


def _unit_rows(z: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    if bad := int((~norms.isfinite()).sum()):
        raise ValueError(f"z must be finite, got {bad} of {len(z)} rows that are not")
    if zero := int((norms == 0).sum()):
        raise ValueError(f"z must have no zero row, which has no direction, got {zero} of {len(z)} rows")
    return (z / (norms * 2**-26)).round_().mul_(2**-26)


def _score_queries(
    unit: Float[Tensor, "m d"], labels: Int[Tensor, " m"], sizes: Int[Tensor, " k"], ks: tuple[int, ...]
) -> Iterator[tuple[Bool[Tensor, "t q"], Float[Tensor, " t"], Float[Tensor, " t"]]]:
    """Yield, tile by tile, whether each query is found at each K, its average precision at R and its R-precision.

    However large a K is, no more than R rows of the largest class are brought into order: where none of them is of its
    class, whether a query is found hangs on how many rows come before the nearest of its class, and they are counted.
    """
    r = sizes[labels] - 1
    deepest = int(r.max())
    rank = torch.arange(1, deepest + 1, device=unit.device, dtype=torch.float64)
    wanted = torch.tensor(ks, device=unit.device)
    members = _members(labels, sizes)

    def score(tile: _Screened) -> tuple[Tensor, Tensor, Tensor]:
        hits = _nearest_hits(tile, deepest)
        missed = (~hits.any(1)).nonzero().flatten()
        before = hits.int().argmax(1).index_fill(0, missed, deepest)
        if max(ks) > deepest:
            before[missed] = _count_before_own(tile.of(missed), members, wanted)
        own_r = r[tile.queries]
        relevant = hits & (rank <= own_r[:, None])
        precision = (hits.cumsum(1) / rank * relevant).sum(1)
        return before[:, None] < wanted, precision / own_r, relevant.sum(1).double() / own_r

    with _a_core_each(unit.device) as apply:
        for tiles in _screen(unit, labels):
            yield from apply(score, tiles)


@contextmanager
def _a_core_each(device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a `map` whose calls run side by side, each on a core of its own; all serve what is done between.

    Of small operations, one core makes nearly as many as all of them together.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    all_there = Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        all_there.wait()

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        for _ in range(threads):
            pool.submit(int)
        all_there.wait()
        torch.set_num_threads(threads)  # of products, for all threads: the last word counts
        yield pool.map


def _members(labels: Int[Tensor, " m"], sizes: Int[Tensor, " k"]) -> Int[Tensor, "k most"]:
    """Return the rows of each class in order, of smaller classes the last one again and again."""
    starts = sizes.cumsum(0) - sizes
    within = torch.arange(int(sizes.max()), device=labels.device)
    return labels.argsort(stable=True)[starts[:, None] + torch.minimum(within, sizes[:, None] - 1)]


class _Screened(NamedTuple):
    """The similarities of some queries to all rows, to themselves -inf, none of them off by more than `error`."""

    similarity: Float[Tensor, "t m"]
    queries: Int[Tensor, " t"]
    error: float
    unit: Float[Tensor, "m d"]
    labels: Int[Tensor, " m"]

    def of(self, rows: Int[Tensor, " s"]) -> "_Screened":
        """Return what is of some of the queries."""
        return self._replace(similarity=self.similarity.index_select(0, rows), queries=self.queries[rows])

    def is_own(self, query: Int[Tensor, " n"], column: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return whether the columns are of the queries' class."""
        return self.labels[self.queries[query]] == self.labels[column]

    def exact(self, query: Int[Tensor, " n"], column: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return exact similarities: of few by pieces that a CPU has in cache, of many out of those to all rows."""
        if len(query) * 16 > self.similarity.numel():  # about where both take as long
            return (self.unit[self.queries] @ self.unit.T)[query, column]
        found = self.unit.new_empty(len(query))
        for piece in _tiles(len(query), max(1, TILE // self.unit.shape[1])):
            products = self.unit[self.queries[query[piece]]].mul_(self.unit[column[piece]])
            torch.sum(products, 1, out=found[piece])
        return found


def _screen(unit: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> Iterator[Iterator[_Screened]]:
    """Yield all similarities, some tiles at a time; they are good until the next are asked for.

    On a CPU they are of float32. Rounded components, d products and d - 1 sums in any order leave a similarity of unit
    rows off by (d + 2) u / (1 - (d + 2) u) at most, u = 2^-24 (Higham, "Accuracy and Stability of Numerical
    Algorithms", section 3.1); what is said is a little more, for thresholds are rounded too. They are exact on a GPU,
    of which float64 is no weakness, and wherever torch has leave to multiply float32 by shorter numbers.
    """
    m, d = unit.shape
    on_cpu = unit.device.type == "cpu"
    is_float32_whole = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    rows, error = (unit.float(), 1.01 * (d + 3) * 2.0**-24) if on_cpu and is_float32_whole else (unit, 0.0)
    tile, block = (max(1, min(m, entries // m)) for entries in (TILE if on_cpu else BLOCK, BLOCK))
    index = torch.arange(m, device=unit.device)
    for first, similarity in _products(rows, tile, block):
        similarity.diagonal(first).fill_(-math.inf)
        parts = _tiles(len(similarity), tile)
        yield (_Screened(similarity[part], index[first:][part], error, unit, labels) for part in parts)


def _products(rows: Float[Tensor, "m d"], tile: int, block: int) -> Iterator[tuple[int, Float[Tensor, "b m"]]]:
    """Yield the products of some rows with all, and the first of those; they are good until the next are asked for.

    The matrix is symmetric: where there is room for all of it, no more than half of it is multiplied.
    """
    m = len(rows)
    if m * m > KEPT:
        memory = rows.new_empty(block, m)
        for some in _tiles(m, block):
            yield some.start, torch.mm(rows[some], rows.T, out=memory[: some.stop - some.start])
        return
    memory = rows.new_empty(m, m)
    for some in _tiles(m, tile):
        torch.mm(rows[some], rows[some.start :].T, out=memory[some, some.start :])
        memory[some.stop :, some] = memory[some, some.stop :].T
    yield 0, memory


def _tiles(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _nearest_hits(tile: _Screened, count: int) -> Bool[Tensor, "t {count}"]:
    """Return whether each of the `count` nearest rows is of the query's class, in order; of equals the lower first.

    The screen may leave open which of two rows is nearer; that matters where one is of the class and the other not.
    """
    width = 2 * tile.error
    query, column = _true_entries(tile.similarity >= _lower_bound(tile.similarity, count) - width)
    sizes = query.bincount(minlength=len(tile.queries))
    place = torch.arange(len(query), device=query.device) - (sizes.cumsum(0) - sizes)[query]
    shape = len(sizes), int(sizes.max())
    values = tile.similarity.new_full(shape, -math.inf).index_put((query, place), tile.similarity[query, column])
    hits = query.new_zeros(shape, dtype=torch.bool).index_put((query, place), tile.is_own(query, column))

    falling, order = values.sort(dim=1, descending=True)
    unsure = torch.zeros_like(hits).scatter(1, order, _near_the_other_kind(falling, hits.gather(1, order), width))
    which = unsure[query, place]
    query, place, column = query[which], place[which], column[which]
    values = values.double().index_put((query, place), tile.exact(query, column))
    return hits.gather(1, values.argsort(dim=1, descending=True, stable=True)[:, :count])


def _lower_bound(similarity: Float[Tensor, "t m"], count: int) -> Float[Tensor, "t 1"]:
    """Return what at least `count` entries of each row reach, and few more: the largest of groups of entries do."""
    m = similarity.shape[1]
    group = max(1, min(16, m // (8 * count)))
    largest = similarity[:, : m // group * group].reshape(-1, group, m // group).amax(1)
    if largest.device.type != "cpu":
        return largest.topk(count, sorted=False).values.amin(1, keepdim=True)
    # NumPy's partition takes a fraction of the time of torch's on a CPU.
    return torch.from_numpy(np.partition(largest.numpy(), -count, axis=1)[:, -count, None])


def _true_entries(mask: Bool[Tensor, "t m"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the rows and the columns of the entries that are true, row by row."""
    if mask.device.type != "cpu":
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    entry = torch.from_numpy(np.flatnonzero(mask.numpy()))  # the same, in a third of the time
    row = entry // mask.shape[1]
    return row, entry - row * mask.shape[1]


def _near_the_other_kind(falling: Float[Tensor, "t w"], hits: Bool[Tensor, "t w"], width: float) -> Bool[Tensor, "t w"]:
    """Return which hits lie within `width` of an entry that is none, and the other way round."""
    near = torch.zeros_like(hits)
    for kind in (hits, ~hits):
        above = torch.where(kind, falling, math.inf).cummin(1).values
        below = torch.where(kind, falling, -math.inf).flip(1).cummax(1).values.flip(1)
        near |= ~kind & ((above - falling <= width) | (falling - below <= width))
    return near


def _count_before_own(tile: _Screened, members: Int[Tensor, "k most"], ks: Int[Tensor, " q"]) -> Int[Tensor, " t"]:
    """Return how many columns come before the first of a query's own; where no K hangs on it, only about as many."""
    width = 2 * tile.error
    own = tile.similarity.gather(1, members[tile.labels[tile.queries]]).amax(1, keepdim=True)
    before = (tile.similarity > own + width).sum(1, dtype=torch.int32).long()  # int32 is summed many times faster
    at_most = (tile.similarity >= own - width).sum(1, dtype=torch.int32) - 1
    unsure = ((before[:, None] < ks) != (at_most[:, None] < ks)).any(1).nonzero().flatten()
    before[unsure] += _count_before_own_within(tile.of(unsure), own[unsure], width)
    return before


def _count_before_own_within(tile: _Screened, own: Float[Tensor, "t 1"], width: float) -> Int[Tensor, " t"]:
    """Return how many of the columns within `width` of `own` come before the first of them that is the query's own."""
    query, column = _true_entries((tile.similarity >= own - width) & (tile.similarity <= own + width))
    value, is_own = tile.exact(query, column), tile.is_own(query, column)
    nearest = value.new_full((len(own),), -math.inf).scatter_reduce(0, query[is_own], value[is_own], "amax")[query]
    is_first = is_own & (value == nearest)
    first = column.new_full((len(own),), len(tile.unit)).scatter_reduce(0, query[is_first], column[is_first], "amin")
    earlier = (value > nearest) | ((value == nearest) & (column < first[query]))
    return query[earlier].bincount(minlength=len(own))


def nmi(assignment: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """Return the normalised mutual information 2 I(C; L) / (H(C) + H(L)) of clusters and classes, in [0, 1].

    I(C; L) = H(C) + H(L) - H(C, L). It is 1 where there is one cluster and one class: the partitions are the same.
    """
    clusters, classes, cells = (_entropy(counts) for counts in _contingency(assignment, labels))
    if clusters + classes == 0:
        return 1.0
    return max(0.0, 2 - 2 * cells / (clusters + classes))  # rounding may leave independent ones at -1e-16


def pair_f1(assignment: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """Return the F1 of the pairs of rows that clusters put together, against those that classes do, in [0, 1].

    Precision is TP / pairs within clusters, recall TP / pairs within classes, TP = sum over (cluster, class) of
    C(n, 2); 0 where there is none.
    """
    clusters, classes, cells = (int((n * (n - 1) // 2).sum()) for n in _contingency(assignment, labels))
    return 2 * cells / (clusters + classes) if cells else 0.0


def _contingency(
    assignment: Int[Tensor, " m"], labels: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"], Int[Tensor, " c"]]:
    """Return the sizes of the clusters, of the classes, and of the cells of both that are not empty."""
    cell = assignment * (labels.max() + 1) + labels
    clusters, classes, cells = (torch.unique(part, return_counts=True)[1] for part in (assignment, labels, cell))
    return clusters, classes, cells


def _entropy(counts: Int[Tensor, " k"]) -> float:
    share = counts.sort().values / counts.sum(dtype=torch.float64)  # sorted: equal sizes, bitwise equal entropies
    return -float((share * share.log()).sum())


@torch.no_grad()
def kmeans(z: Float[Tensor, "m d"], k: int, runs: int, seed: int) -> Int[Tensor, "{runs} m"]:
    """Cluster the rows of `z` into `k`, `runs` times from different starts, and return each run's assignment.

    Lloyd's algorithm from a greedy k-means++ start (Arthur and Vassilvitskii, "k-means++", SODA 2007), to the end or
    LLOYD_STEPS, all runs at once. A row goes to another cluster where its centre is nearer, of equals to the lower one.
    A cluster that empties starts again at the row farthest from its own centre; several take the next farthest, in
    order. Where `z` has fewer than `k` distinct rows, clusters stay empty. The same seed gives the same assignment on
    the same device.
    """
    z = (z - z.mean(0, dtype=torch.float64)).to(z.dtype)  # distances by inner products lose less near the origin
    kept = z.new_empty(runs, k, len(z)) if runs * k * len(z) <= KEPT else None
    assignment = torch.zeros(runs, len(z), dtype=torch.long, device=z.device)
    centres = z[_spread_rows(z, k, runs, seed)]
    assignment = _nearest_centre(z, centres, torch.ones_like(centres[..., 0], dtype=torch.bool), assignment, kept)
    for _ in range(LLOYD_STEPS):
        before, centres = centres, _means(z, assignment, k)
        previous, assignment = assignment, _nearest_centre(z, centres, (centres != before).any(2), assignment, kept)
        if assignment.equal(previous):
            break
    return assignment


def _spread_rows(z: Float[Tensor, "m d"], k: int, runs: int, seed: int) -> Int[Tensor, "{runs} {k}"]:
    """Draw rows by k-means++: each in proportion to its squared distance from those before, the best of a few draws."""
    m, trials = len(z), 2 + int(math.log(k))
    draws = torch.from_numpy(np.random.default_rng(seed).random((runs, k, trials))).to(z.device)
    norms = z.square().sum(1)
    each_run = torch.arange(runs, device=z.device)
    chosen = [(draws[:, 0, 0] * m).long()]
    d2 = _squared_distances(z, norms, chosen[0])
    for step in range(1, k):
        cumulative = d2.cumsum(1, dtype=torch.float64)
        # Where all rows lie on a centre already there is nothing to draw from: the last row will do.
        drawn = torch.searchsorted(cumulative, draws[:, step] * cumulative[:, -1:], right=True).clamp_max(m - 1)
        closer = torch.minimum(d2[:, None], _squared_distances(z, norms, drawn))
        best = closer.sum(2).argmin(1)
        d2 = closer[each_run, best]
        chosen.append(drawn[each_run, best])
    return torch.stack(chosen, dim=1)


def _squared_distances(
    z: Float[Tensor, "m d"], norms: Float[Tensor, " m"], rows: Int[Tensor, "*r"]
) -> Float[Tensor, "*r m"]:
    flat = rows.flatten()
    d2 = torch.addmm(norms + norms[flat, None], z[flat], z.T, alpha=-2).clamp_min_(0)
    return d2.view(*rows.shape, len(z))


def _nearest_centre(
    z: Float[Tensor, "m d"],
    centres: Float[Tensor, "runs k d"],
    moved: Bool[Tensor, "runs k"],
    assignment: Int[Tensor, "runs m"],
    kept: Float[Tensor, "runs k m"] | None,
) -> Int[Tensor, "runs m"]:
    """Return the nearest centre of each row, where some centres have moved since `assignment`.

    Most clusters are soon what they stay, and so, where how near it is to each row is kept, not measured again
    (Kaukoranta, Franti and Nevalainen, "A fast exact GLA based on code vector activity detection", IEEE Transactions on
    Image Processing 9(8), 2000).
    """
    runs, k, _ = centres.shape
    if kept is not None:
        kept[moved] = _nearness(z, centres[moved])
        return _stay_or_move(kept, assignment)
    tiles = _tiles(len(z), max(1, BLOCK // (runs * k)))
    flat = centres.flatten(0, 1)
    return torch.cat(
        [_stay_or_move(_nearness(z[tile], flat).view(runs, k, -1), assignment[:, tile]) for tile in tiles], dim=1
    )


def _nearness(z: Float[Tensor, "m d"], centres: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
    """Return z' c - |c|^2 / 2, the larger the nearer."""
    return torch.addmm(centres.square().sum(1, keepdim=True) / 2, centres, z.T, beta=-1)


def _stay_or_move(nearness: Float[Tensor, "runs k m"], assignment: Int[Tensor, "runs m"]) -> Int[Tensor, "runs m"]:
    largest = nearness.amax(1)
    run, row = (nearness.gather(1, assignment[:, None])[:, 0] != largest).nonzero(as_tuple=True)
    return assignment.index_put((run, row), nearness[run, :, row].argmax(1))


def _means(z: Float[Tensor, "m d"], assignment: Int[Tensor, "runs m"], k: int) -> Float[Tensor, "runs {k} d"]:
    """Return the mean of each cluster; of an empty one, a row far from its centre."""
    runs, m = assignment.shape
    cluster = (assignment + k * torch.arange(runs, device=z.device)[:, None]).flatten()
    sizes = cluster.bincount(minlength=runs * k)
    rows = cluster.argsort(stable=True) % m
    # A sum in the order of the rows, where adding by index would leave the order to a GPU's scheduler.
    centres = F.embedding_bag(rows, z, sizes.cumsum(0) - sizes, mode="mean").view(runs, k, -1)
    empty = (sizes == 0).view(runs, k)
    for run in empty.any(1).nonzero().flatten().tolist():
        d2 = (z - centres[run, assignment[run]]).square().sum(1)
        farthest = d2.argsort(descending=True, stable=True)
        centres[run, empty[run]] = z[farthest[: int(empty[run].sum())]]
    return centres
