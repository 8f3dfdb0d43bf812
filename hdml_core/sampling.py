"""Class-balanced batches, laid out by role.

The batches of an epoch are a pure function of (seed, epoch): a run that resumes at an epoch draws the batches that
it would have drawn, with no sampler state to keep.
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
    loss's; see `notation`.

    Raises ConfigError where the labels have too few classes for the batch.
    """

    def __init__(self, labels: Int[np.ndarray, " m"], layout: Layout, batch_size: int, steps: int, seed: int) -> None:
        self.layout = layout
        self.tuples = batch_size // ROWS_PER_TUPLE[layout]
        self.steps = steps or -(-len(labels) // batch_size)
        self.seed = seed
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

    def epoch(self, epoch: int) -> Iterator[Int[np.ndarray, " b"]]:
        """Yield the row numbers of each batch of this epoch, role after role."""
        rng = np.random.default_rng([self.seed, epoch])
        for _ in range(self.steps):
            classes = rng.permutation(len(self.counts))
            first, second = self._two_rows(rng, classes[: self.tuples])
            roles = [first, second]
            if self.layout == "triplets":
                roles.append(self._two_rows(rng, classes[self.tuples : 2 * self.tuples])[0])
            yield np.concatenate(roles)

    def _two_rows(
        self, rng: np.random.Generator, classes: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        counts = self.counts[classes]
        first = rng.integers(counts)
        second = (first + 1 + rng.integers(counts - 1)) % counts
        return self.rows[self.starts[classes] + first], self.rows[self.starts[classes] + second]
