"""Mini-batches whose content does not depend on the number of ranks.

The part of the graph is the unit: each part shuffles its own nodes with a generator keyed by (seed, epoch, part) and
gives every global step its share. A rank's batch is what its parts give. Of others' parts it knows how many nodes they
go through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.bits import generator


@dataclass(frozen=True)
class PartBatches:
    """The nodes to go through, and how many of them make one global step."""

    counts: list[int]  # of each part of the graph
    nodes: dict[int, np.ndarray]  # of the parts of this rank, ascending node ids
    batch_size: int  # over all ranks

    @classmethod
    def of(
        cls, store: GraphStore, parts: list[int], wanted: Callable[[np.ndarray], np.ndarray], batch_size: int,
        only: str | None = None,
    ) -> Self:  # fmt: skip
        """The nodes of splits that are `wanted`, `[n] → bool [n]`; `parts` are this rank's.

        only: an array of the store that is not zero where nodes count.
        """
        masks = (wanted(store.array("split", part)) for part in range(store.num_parts))
        if only is not None:
            masks = (mask & (store.array(only, part) != 0) for part, mask in enumerate(masks))
        chosen = [(int(mask.sum()), mask if part in parts else None) for part, mask in enumerate(masks)]
        nodes = {part: store.ids(part)[mask] for part, (_, mask) in enumerate(chosen) if mask is not None}
        return cls([count for count, _ in chosen], nodes, batch_size)

    @property
    def num_nodes(self) -> int:
        """Of all parts."""
        return sum(self.counts)

    @cached_property
    def ids(self) -> np.ndarray:
        """This rank's nodes, by part."""
        return joined(list(self.nodes.values()))

    @cached_property
    def positions(self) -> np.ndarray:
        """Where `ids` are among the nodes of all parts in the order of the parts."""
        starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return joined([starts[part] + np.arange(len(nodes)) for part, nodes in self.nodes.items()])

    @cached_property
    def num_steps(self) -> int:
        """Steps per epoch. At most the nodes of the largest part, so that no step is empty."""
        return min(-(-self.num_nodes // self.batch_size), max(self.counts, default=0))

    def global_rows(self, step: int) -> int:
        """Rows of a step over all parts."""
        return int(self._starts[step + 1] - self._starts[step])

    def epoch(self, seed: int, epoch: int | None) -> list[list[np.ndarray]]:
        """For each step the nodes that each of this rank's parts gives; in ascending order if `epoch` is None."""
        orders = self.nodes
        if epoch is not None:
            orders = {part: generator(seed, epoch, part).permutation(nodes) for part, nodes in orders.items()}
        shares = [np.split(order, self._starts_of(len(order))[1:-1]) for order in orders.values()]
        return [[each[step] for each in shares] for step in range(self.num_steps)]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Rows of all parts in the steps before each, `[num_steps + 1]`."""
        return sum((self._starts_of(count) for count in self.counts), np.zeros(1, np.int64))

    def _starts_of(self, rows: int) -> np.ndarray:
        """Of a part with so many rows, those in the steps before each, `[num_steps + 1]`."""
        return rows * np.arange(self.num_steps + 1) // max(self.num_steps, 1)


def joined(ids: list[np.ndarray]) -> np.ndarray:
    """Node ids one after the other; of none, none."""
    return np.concatenate([*ids, np.empty(0, np.int64)]).astype(np.int64, copy=False)
