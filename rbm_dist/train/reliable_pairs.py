"""KRD's pairs of a batch: which neighbours teach which rows, drawn from the graph."""

from dataclasses import dataclass

import numpy as np
import torch

from rbm_dist.config.run import KrdConfig
from rbm_dist.distill.krd import Pairs, Reliability
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.rows import derive_keys


@dataclass(frozen=True)
class Links:
    """Teachers j, the rows i among them first, and pairs of the two."""

    nodes: np.ndarray  # [n] ids of all j
    change_n: np.ndarray  # their δ
    soft_nC: np.ndarray  # their soft labels
    teacher_m: np.ndarray  # of each pair, the position of j
    row_m: np.ndarray  # and of i


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

    def links(self, ids: np.ndarray, draw: int) -> Links:
        """Who teaches some rows. A pair's draw depends on (draw, i, j) alone."""
        sample = self._store.sample(ids, (self._settings.fanout,), draw)
        change_n, soft_nC = self.change(sample.nodes), self._store.gather("soft", sample.nodes)
        keep_probability_n = 1 - change_n**self._reliability.power
        keys_m = derive_keys(
            derive_keys(draw, torch.from_numpy(ids[sample.dst])), torch.from_numpy(sample.nodes[sample.src])
        )
        uniform_m = (keys_m.numpy() >> 11 & (2**53 - 1)) / 2**53
        kept_m = uniform_m < keep_probability_n[sample.src]
        if self._agreeing:
            class_n = soft_nC.argmax(1)
            kept_m &= class_n[sample.src] == class_n[sample.dst]
        own = np.arange(len(ids))
        teacher_m, row_m = (np.concatenate([own, each[kept_m]]) for each in (sample.src, sample.dst))
        return Links(sample.nodes, change_n, soft_nC, teacher_m, row_m)

    def draw(self, ids: np.ndarray, draw: int, dtype: torch.dtype) -> Pairs:
        """The pairs of some rows, in CPU memory."""
        links, bins = self.links(ids, draw), self._settings.bins
        pairs_B = np.bincount(links.row_m, minlength=len(ids)).astype(np.float64)
        return Pairs(
            soft_nC=torch.from_numpy(links.soft_nC).to(dtype),
            teacher_m=torch.from_numpy(links.teacher_m),
            row_m=torch.from_numpy(links.row_m),
            weight_B=torch.from_numpy(1 / pairs_B if self._agreeing else np.ones(len(ids))).to(dtype),
            bin_B=torch.from_numpy(np.minimum((links.change_n[: len(ids)] * bins).astype(np.int64), bins - 1)),
        )
