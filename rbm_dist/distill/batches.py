"""Mini-batches whose content does not depend on the number of ranks.

The part of the graph is the unit: each part shuffles its own nodes with a generator keyed by (seed, epoch, part) and
gives every global step its share. A rank's batch is what its parts give.
"""

from dataclasses import dataclass

import numpy as np

from rbm_dist.graph.random_bits import generator


@dataclass(frozen=True)
class PartBatches:
    """The nodes to go through, by part, and how many of them make one global step."""

    nodes: list[np.ndarray]  # per part of the graph, ascending node ids
    batch_size: int  # over all ranks

    @property
    def num_steps(self) -> int:
        """Steps per epoch. At most the nodes of the largest part, so that no step is empty."""
        rows = [len(nodes) for nodes in self.nodes]
        return min(-(-sum(rows) // self.batch_size), max(rows, default=0))

    def global_rows(self, step: int) -> int:
        """Rows of a step over all parts."""
        return sum(stop - start for start, stop in (self._share(len(nodes), step) for nodes in self.nodes))

    def epoch(self, parts: list[int], seed: int, epoch: int | None) -> list[list[np.ndarray]]:
        """For each step the nodes that each of `parts` gives; in ascending order if `epoch` is None."""
        orders = {part: self.nodes[part] for part in parts}
        if epoch is not None:
            orders = {part: generator(seed, epoch, part).permutation(nodes) for part, nodes in orders.items()}
        return [
            [order[slice(*self._share(len(order), step))] for order in orders.values()]
            for step in range(self.num_steps)
        ]

    def _share(self, rows: int, step: int) -> tuple[int, int]:
        return rows * step // self.num_steps, rows * (step + 1) // self.num_steps
