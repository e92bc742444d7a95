"""KRD's pairs of a batch: which neighbours teach which rows, drawn from the graph."""

import numpy as np
import torch

from rbm_dist.config.run import KrdConfig
from rbm_dist.distill.krd import Pairs, Reliability
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.rows import derive_keys


class ReliablePairs:
    """Draws the pairs of a batch. Everything but q is the same for all epochs."""

    def __init__(self, settings: KrdConfig, store: GraphStore, reliability: Reliability):
        self._settings, self._store, self._reliability = settings, store, reliability
        self._agreeing = settings.neighbours == "agreeing"
        parts = range(store.num_parts)
        # Unseen nodes are hidden from training: how far theirs change must not scale the others'.
        seen = [store.array("entropy_change", part)[store.array("split", part) != UNSEEN] for part in parts]
        self._highest = max((float(change.max()) for change in seen if len(change)), default=0.0)

    def change(self, ids: np.ndarray) -> np.ndarray:
        """δ of some nodes that training sees, `[n]`, in [0, 1]."""
        change_n = self._store.gather("entropy_change", ids).astype(np.float64)
        return change_n / self._highest if self._highest > 0 else change_n

    def links(self, ids: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of teachers j, those of the rows first; for each pair of rows i the position of j, and of i.

        A pair's draw depends on (draw, i, j) alone.
        """
        sample = self._store.sample(ids, (self._settings.fanout,), draw)
        keep_probability_n = 1 - self.change(sample.nodes) ** self._reliability.power
        keys_m = derive_keys(
            derive_keys(draw, torch.from_numpy(ids[sample.dst])), torch.from_numpy(sample.nodes[sample.src])
        )
        uniform_m = (keys_m.numpy() >> 11 & (2**53 - 1)) / 2**53
        kept_m = uniform_m < keep_probability_n[sample.src]
        if self._agreeing:
            class_n = self._store.gather("soft", sample.nodes).argmax(1)
            kept_m &= class_n[sample.src] == class_n[sample.dst]
        own = np.arange(len(ids))
        teacher_m, row_m = (np.concatenate([own, each[kept_m]]) for each in (sample.src, sample.dst))
        return sample.nodes, teacher_m, row_m

    def draw(self, ids: np.ndarray, draw: int, dtype: torch.dtype) -> Pairs:
        """The pairs of some rows, in CPU memory."""
        nodes, teacher_m, row_m = self.links(ids, draw)
        pairs_B = np.bincount(row_m, minlength=len(ids)).astype(np.float64)
        bins = self._settings.bins
        return Pairs(
            soft_nC=torch.from_numpy(self._store.gather("soft", nodes)).to(dtype),
            teacher_m=torch.from_numpy(teacher_m),
            row_m=torch.from_numpy(row_m),
            weight_B=torch.from_numpy(1 / pairs_B if self._agreeing else np.ones(len(ids))).to(dtype),
            bin_B=torch.from_numpy(np.minimum((self.change(ids) * bins).astype(np.int64), bins - 1)),
        )
