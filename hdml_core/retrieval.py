"""How well embeddings retrieve their class: Recall@K, MAP@R and R-precision; NMI and F1 of a clustering.

Rows are compared on the unit sphere, where the largest inner product is the smallest Euclidean distance. Neighbours
are exact: the components of the unit rows are rounded to multiples of 2^-26, about what float32 resolves, and
multiplied in float64. Every product and every partial sum is then a multiple of 2^-52 below 2, which float64 holds
without rounding, so a similarity is the same number in whatever order a device sums it: equal rows tie exactly,
and neither the tile nor the device has a say in the ranking. Ties go to the lower row.
"""

import math
import statistics
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hdml_core.notation import RetrievalReport

BLOCK, TILE = 2**24, 2**20
"""Entries of a matrix that are multiplied at once, 128 MiB in float64, and how many of those a CPU looks at at once, to
have them in cache; neighbours depend on neither."""

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
    return (z / norms).mul_(2**26).round_().mul_(2**-26)


def _score_queries(
    unit: Float[Tensor, "m d"], labels: Int[Tensor, " m"], sizes: Int[Tensor, " k"], ks: tuple[int, ...]
) -> Iterator[tuple[Bool[Tensor, "t q"], Float[Tensor, " t"], Float[Tensor, " t"]]]:
    """Yield, tile by tile, whether each query is found at each K, its average precision at R and its R-precision.

    However large a K is, no more than R rows of the largest class are brought into order: whether a query is found
    hangs on how many rows come before the nearest of its class, and those need only be counted.
    """
    r = sizes[labels] - 1
    deepest = int(r.max())
    rank = torch.arange(1, deepest + 1, device=unit.device, dtype=torch.float64)
    wanted = torch.tensor(ks, device=unit.device)
    members = _members(labels, sizes)
    for tile, similarity in _similarities(unit):
        before = _count_before_own(similarity, members[labels[tile]])
        hits = labels[_nearest(similarity, deepest)] == labels[tile, None]
        relevant = hits & (rank <= r[tile, None])
        precision = (hits.cumsum(1) / rank * relevant).sum(1)
        yield before[:, None] < wanted, precision / r[tile], relevant.sum(1).double() / r[tile]


def _members(labels: Int[Tensor, " m"], sizes: Int[Tensor, " k"]) -> Int[Tensor, "k most"]:
    """Return the rows of each class in order, of smaller classes the last one again and again."""
    starts = sizes.cumsum(0) - sizes
    within = torch.arange(int(sizes.max()), device=labels.device)
    return labels.argsort(stable=True)[starts[:, None] + torch.minimum(within, sizes[:, None] - 1)]


def _count_before_own(similarity: Float[Tensor, "t m"], own: Int[Tensor, "t most"]) -> Int[Tensor, " t"]:
    """Return how many columns come before the first of a query's own: the larger ones, and lower ones of equals."""
    largest = similarity.gather(1, own).amax(1, keepdim=True)
    before = torch.count_nonzero(similarity > largest, dim=1)
    tied = torch.count_nonzero(similarity == largest, dim=1) > 1
    is_equal = similarity[tied] == largest[tied]
    first = torch.where(is_equal.gather(1, own[tied]), own[tied], similarity.shape[1]).amin(1, keepdim=True)
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    return before.index_put((tied,), before[tied] + (is_equal & (columns < first)).sum(1))


def _similarities(unit: Float[Tensor, "m d"]) -> Iterator[tuple[slice, Float[Tensor, "t m"]]]:
    """Yield the similarities of some queries to all rows, to themselves -inf; good until the next are asked."""
    m = len(unit)
    at_once = TILE if unit.device.type == "cpu" else BLOCK
    memory = unit.new_empty(min(m, max(1, BLOCK // m)), m)
    for block in _tiles(m, len(memory)):
        similarity = torch.mm(unit[block], unit.T, out=memory[: block.stop - block.start])
        similarity.diagonal(block.start).fill_(-math.inf)
        for tile in _tiles(len(similarity), max(1, at_once // m)):
            yield slice(block.start + tile.start, block.start + tile.stop), similarity[tile]


def _tiles(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _nearest(similarity: Float[Tensor, "t m"], count: int) -> Int[Tensor, "t {count}"]:
    """Return the columns of the `count` largest entries of each row, in order; of equals the lower column first."""
    columns = _largest(similarity, count + 1).sort(1).values
    largest, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # Which of equals are among the largest is left open; few rows have any.
    open_ = largest[:, count - 1] == largest[:, count]
    columns[open_] = similarity[open_].argsort(dim=1, descending=True, stable=True)[:, : count + 1]
    return columns[:, :count]


def _largest(similarity: Float[Tensor, "t m"], count: int) -> Int[Tensor, "t {count}"]:
    """Return the columns of the `count` largest entries of each row, in any order."""
    if similarity.device.type != "cpu":
        return similarity.topk(count, sorted=False).indices
    # NumPy's partition takes a fraction of the time of torch's on a CPU.
    return torch.from_numpy(np.argpartition(similarity.numpy(), -count, axis=1)[:, -count:])


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
    LLOYD_STEPS, all runs at once. A row as near to two centres goes to the lower cluster. A cluster that empties
    starts again at the row farthest from its own centre; several take the next farthest, in order. Where `z` has fewer
    than `k` distinct rows, clusters stay empty. The same seed gives the same assignment on the same device.
    """
    z = (z - z.mean(0, dtype=torch.float64)).to(z.dtype)  # distances by inner products lose less near the origin
    centres = z[_spread_rows(z, k, runs, seed)]
    assignment = _nearest_centre(z, centres)
    for _ in range(LLOYD_STEPS):
        centres = _means(z, assignment, k)
        previous, assignment = assignment, _nearest_centre(z, centres)
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


def _nearest_centre(z: Float[Tensor, "m d"], centres: Float[Tensor, "runs k d"]) -> Int[Tensor, "runs m"]:
    runs, k, _ = centres.shape
    flat = centres.flatten(0, 1)
    half_norms = flat.square().sum(1) / 2
    return torch.cat(
        [
            torch.addmm(half_norms, z[tile], flat.T, beta=-1).view(-1, runs, k).argmax(2)
            for tile in _tiles(len(z), max(1, BLOCK // len(flat)))
        ]
    ).T.contiguous()


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
