"""Class-balanced batches, laid out by role.

The batches of an epoch are a pure function of (seed, epoch): a run that resumes at an epoch draws the batches that
it would have drawn, with no sampler state to keep. Several processes share a batch by taking their part of its tuples.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from hdml_core.config import ConfigError
from hdml_core.notation import Layout

ROWS_PER_TUPLE = {"pairs": 2, "triplets": 3}
CLASSES_PER_TUPLE = {"pairs": 1, "triplets": 2}


class RoleBatches:
    """Batches of n tuples of distinct classes: uniform classes, then uniform distinct rows of each class.

    `labels` are 0..k-1, one per row, with at least two rows of every class. `layout` is the metric
    loss's; see `notation`. Of `world` processes, this is number `rank`; each gets n / world tuples of every batch.

    Raises ConfigError where the labels have too few classes for the batch or the tuples can't be shared out.
    """

    def __init__(
        self,
        labels: Int[np.ndarray, " m"],
        layout: Layout,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.layout = layout
        self.tuples = batch_size // ROWS_PER_TUPLE[layout]
        self.steps = steps or -(-len(labels) // batch_size)
        self.seed = seed
        self.rank, self.world = rank, world
        self.rows = np.argsort(labels, kind="stable")
        self.counts = np.bincount(labels)
        self.starts = np.cumsum(self.counts) - self.counts
        needed, found = self.tuples * CLASSES_PER_TUPLE[layout], len(self.counts)
        if needed > found:
            most = found // CLASSES_PER_TUPLE[layout] * ROWS_PER_TUPLE[layout]
            raise ConfigError(
                f"data.batch_size must be <= {most}, got {batch_size}: its {self.tuples} {layout} need {needed} "
                f"classes and the training set has {found}"
            )
        if self.tuples % world:
            raise ConfigError(
                f"data.batch_size must make a multiple of {world} {layout}, as many for each process, "
                f"got {batch_size}, which makes {self.tuples}"
            )

    def epoch(self, epoch: int) -> Iterator[Int[np.ndarray, " b"]]:
        """Yield the row numbers of each batch of this epoch, role after role."""
        rng = np.random.default_rng([self.seed, epoch])
        share = slice(self.rank * self.tuples // self.world, (self.rank + 1) * self.tuples // self.world)
        for _ in range(self.steps):
            classes = rng.permutation(len(self.counts))
            first, second = self._two_rows(rng, classes[: self.tuples])
            roles = [first, second]
            if self.layout == "triplets":
                roles.append(self._two_rows(rng, classes[self.tuples : 2 * self.tuples])[0])
            yield np.concatenate([role[share] for role in roles])

    def _two_rows(
        self, rng: np.random.Generator, classes: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        counts = self.counts[classes]
        first = rng.integers(counts)
        second = (first + 1 + rng.integers(counts - 1)) % counts
        return self.rows[self.starts[classes] + first], self.rows[self.starts[classes] + second]
