"""Retrieval quality of embeddings: Recall@K, MAP@R, R-precision, NMI and F1.

The protocol is the authors': embeddings in inference mode, L2-normalised for evaluation only, the query itself never
among its neighbours. All of it is exact and runs on the tensor's device; similarities are computed for a tile of
queries at a time, so memory stays fixed however many rows there are. Neighbours of equal similarity rank by row.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hdml_core.notation import RetrievalReport

TILE_ENTRIES = 1 << 24
"""Entries of a tile of similarities: 64 MiB in float32."""
LLOYD_STEPS = 300
"""At most so many steps of k-means; it stops where no row changes its cluster."""


def evaluate_retrieval(
    z: Float[Tensor, "m d"], labels: Int[Tensor, " m"], ks: tuple[int, ...], clusterings: int, seed: int
) -> RetrievalReport:
    """Return every retrieval metric of the embeddings z.

    Recall@K for each K of `ks`; MAP@R and R-precision (Musgrave et al. 2020), R being the number of other rows of the
    query's class; NMI and F1 of `clusterings` runs of k-means with as many clusters as there are classes, their means
    and standard deviations. Raises ValueError where z is not finite or has a zero row, a class has one row, or a K
    exceeds the m - 1 neighbours.
    """
    _check(z, labels, ks)
    z = F.normalize(z, dim=1)
    hits, relevant = neighbour_hits(z, labels, max(ks))
    recall_at = {k: float(hits[:, :k].any(1).double().mean()) for k in ks}

    rank = torch.arange(1, hits.shape[1] + 1, device=z.device)
    within_r = hits & (rank <= relevant[:, None])
    precision = within_r.cumsum(1).double() / rank
    r_precision = float((within_r.sum(1).double() / relevant).mean())
    map_at_r = float(((precision * within_r).sum(1) / relevant).mean())

    classes = int(labels.unique().numel())
    assignments = [kmeans(z, classes, seed + run) for run in range(clusterings)]
    nmis = torch.tensor([nmi(assignment, labels) for assignment in assignments], dtype=torch.float64)
    f1s = torch.tensor([pair_f1(assignment, labels) for assignment in assignments], dtype=torch.float64)
    return RetrievalReport(
        recall_at=recall_at,
        map_at_r=map_at_r,
        r_precision=r_precision,
        nmi=float(nmis.mean()),
        nmi_std=float(nmis.std(correction=0)),
        f1=float(f1s.mean()),
        f1_std=float(f1s.std(correction=0)),
    )


def neighbour_hits(
    z: Float[Tensor, "m d"], labels: Int[Tensor, " m"], k: int
) -> tuple[Bool[Tensor, "m ranks"], Int[Tensor, " m"]]:
    """Return which of each row's nearest others, by inner product, share its class, and how many others do in all.

    As many ranks are returned as `k` or the largest class asks for, whichever is more.
    """
    m = len(z)
    relevant = torch.bincount(labels)[labels] - 1
    ranks = max(k, int(relevant.max()))
    hits = torch.empty(m, ranks, dtype=torch.bool, device=z.device)
    for queries in torch.arange(m, device=z.device).split(max(1, TILE_ENTRIES // m)):
        similarity = z[queries] @ z.T
        similarity[torch.arange(len(queries), device=z.device), queries] = -torch.inf
        nearest = _stable_topk(similarity, ranks)
        hits[queries] = labels[nearest] == labels[queries, None]
    return hits, relevant


def _stable_topk(similarity: Float[Tensor, "q m"], ranks: int) -> Int[Tensor, "q ranks"]:
    """Return the columns of the `ranks` largest entries of each row, largest first, equals by column.

    Everything above the last value that is in is in; of those that equal it, the first columns fill what is left.
    """
    values, columns = similarity.topk(ranks, dim=1)
    last = values[:, -1:]
    ties = (similarity == last).sum(1) > (values == last).sum(1)
    for row in ties.nonzero().flatten():
        columns[row] = similarity[row].sort(descending=True, stable=True).indices[:ranks]
        values[row] = similarity[row, columns[row]]
    by_column = columns.argsort(dim=1)
    columns, values = columns.gather(1, by_column), values.gather(1, by_column)
    return columns.gather(1, values.argsort(dim=1, descending=True, stable=True))


def kmeans(z: Float[Tensor, "m d"], clusters: int, seed: int) -> Int[Tensor, " m"]:
    """Return a cluster for each row: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's steps until none moves.

    A cluster that runs empty takes the row farthest from its own centre. Draws come from a CPU generator, so they do
    not depend on the device.
    """
    random = torch.Generator().manual_seed(seed)
    centres = _plus_plus(z, clusters, random)
    squares = z.square().sum(1)
    assignment = torch.full((len(z),), -1, device=z.device)
    for _ in range(LLOYD_STEPS):
        distance = squares[:, None] - 2 * z @ centres.T + centres.square().sum(1)
        nearest, moved_to = distance.min(1)
        counts = torch.bincount(moved_to, minlength=clusters)
        for empty in (counts == 0).nonzero().flatten():
            farthest = nearest.argmax()
            nearest[farthest] = -torch.inf
            moved_to[farthest] = empty
        if torch.equal(moved_to, assignment):
            break
        assignment = moved_to
        counts = torch.bincount(assignment, minlength=clusters).clamp(min=1)
        centres = torch.zeros_like(centres).index_add_(0, assignment, z) / counts[:, None]
    return assignment


def _plus_plus(z: Float[Tensor, "m d"], clusters: int, random: torch.Generator) -> Float[Tensor, "k d"]:
    """Return centres drawn one after the other, each row with odds of its squared distance to those drawn before."""
    squares = z.square().sum(1)
    chosen = [int(torch.randint(len(z), (1,), generator=random))]
    distance = torch.full_like(squares, torch.inf)
    for _ in range(clusters - 1):
        centre = z[chosen[-1]]
        distance = torch.minimum(distance, (squares - 2 * (z @ centre) + centre @ centre).clamp(min=0))
        odds = distance.double().cumsum(0).cpu()
        point = float(torch.rand(1, generator=random, dtype=torch.float64)) * float(odds[-1])
        chosen.append(min(int(torch.searchsorted(odds, point, right=True)), len(z) - 1))
    return z[chosen].clone()


def nmi(assignment: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """Return normalised mutual information, 2 I(C; L) / (H(C) + H(L)); 1 where both are a single block."""
    joint = _contingency(assignment, labels).double() / len(labels)
    by_cluster, by_class = joint.sum(1), joint.sum(0)
    entropies = _entropy(by_cluster) + _entropy(by_class)
    if entropies == 0:
        return 1.0
    return float(2 * (entropies - _entropy(joint.flatten())) / entropies)


def _entropy(p: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return -torch.special.xlogy(p, p).sum()


def pair_f1(assignment: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """Return the F1 over pairs of rows: finds are pairs of one cluster, hits those of one class too; 0 without hits."""
    joint = _contingency(assignment, labels)
    pairs, in_cluster, in_class = (
        float((counts * (counts - 1)).sum()) / 2 for counts in (joint, joint.sum(1), joint.sum(0))
    )
    return 2 * pairs / (in_cluster + in_class) if pairs else 0.0


def _contingency(assignment: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> Int[Tensor, "clusters classes"]:
    """Return how many rows of each class each cluster holds."""
    clusters, classes = int(assignment.max()) + 1, int(labels.max()) + 1
    return torch.bincount(assignment * classes + labels, minlength=clusters * classes).view(clusters, classes)


def _check(z: Float[Tensor, "m d"], labels: Int[Tensor, " m"], ks: tuple[int, ...]) -> None:
    bad = int((~z.isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"embeddings must be finite, got {bad} of {len(z)} rows with NaN or infinity")
    zero = int((z == 0).all(1).sum())
    if zero:
        raise ValueError(f"embeddings must not be zero, since they are normalised, got {zero} of {len(z)} rows")
    counts = torch.bincount(labels)
    alone = (counts == 1).nonzero().flatten().tolist()
    if alone:
        raise ValueError(
            f"every class must have 2 rows or more, got one in class {alone[0]} ({len(alone)} such classes)"
        )
    if max(ks) > len(z) - 1:
        raise ValueError(
            f"K of Recall@K must be <= {len(z) - 1}, the neighbours of each of {len(z)} rows, got {max(ks)}"
        )
