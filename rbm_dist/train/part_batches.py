"""Mini-batches whose content does not depend on the number of ranks.

The part of the graph is the unit: each part shuffles its own nodes with a generator keyed by (seed, epoch, part) and
gives every global step its share. A rank's batch is what its parts give.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rbm_dist.randomness.bits import generator


@dataclass(frozen=True)
class PartBatches:
    """The nodes to go through, by part, and how many of them make one global step."""

    nodes: list[np.ndarray]  # per part of the graph, ascending node ids
    batch_size: int  # over all ranks

    @cached_property
    def num_steps(self) -> int:
        """Steps per epoch. At most the nodes of the largest part, so that no step is empty."""
        rows = [len(nodes) for nodes in self.nodes]
        return min(-(-sum(rows) // self.batch_size), max(rows, default=0))

    def global_rows(self, step: int) -> int:
        """Rows of a step over all parts."""
        return int(self._starts[step + 1] - self._starts[step])

    def epoch(self, parts: list[int], seed: int, epoch: int | None) -> list[list[np.ndarray]]:
        """For each step the nodes that each of `parts` gives; in ascending order if `epoch` is None."""
        orders = {part: self.nodes[part] for part in parts}
        if epoch is not None:
            orders = {part: generator(seed, epoch, part).permutation(nodes) for part, nodes in orders.items()}
        shares = [np.split(order, self._starts_of(len(order))[1:-1]) for order in orders.values()]
        return [[each[step] for each in shares] for step in range(self.num_steps)]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Rows of all parts in the steps before each, `[num_steps + 1]`."""
        return sum((self._starts_of(len(nodes)) for nodes in self.nodes), np.zeros(1, np.int64))

    def _starts_of(self, rows: int) -> np.ndarray:
        """Of a part with so many rows, those in the steps before each, `[num_steps + 1]`."""
        return rows * np.arange(self.num_steps + 1) // max(self.num_steps, 1)
