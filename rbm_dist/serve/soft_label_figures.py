"""What soft labels are worth to who learns from them: how sure and how right they are, and whether neighbours agree.

Counted part by part, and added up: what a part counts needs the arrays of no other part.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from rbm_dist.graph.propagate import mean_of_sources
from rbm_dist.graph.splits import VAL
from rbm_dist.graph.store import SOFT, GraphStore
from rbm_dist.serve.accuracy import chunks

_BINS = 15  # of the calibration error, as Guo et al. (2017) have them
_SAMPLED = 4096  # nodes of a part whose neighbours are looked at

Counts = dict[str, list[float]]
"""Ready for JSON: of validation nodes, by confidence, `nodes`, `confidence`, `right`; `sampled` nodes, who differs."""


def count(store: GraphStore, part: int) -> Counts:
    """Of one part."""
    nodes, confidence, right = np.zeros((3, _BINS))
    for ids in chunks(store.ids(part)[store.array("split", part) == VAL]):
        soft_nC = store.gather(SOFT, ids)
        sure_n = soft_nC.max(1).astype(np.float64)
        bin_n = np.minimum((sure_n * _BINS).astype(int), _BINS - 1)
        hit_n = (soft_nC.argmax(1) == store.gather("label", ids)) & (sure_n > 0)
        nodes += np.bincount(bin_n, minlength=_BINS)
        confidence += np.bincount(bin_n, sure_n, _BINS)
        right += np.bincount(bin_n, hit_n, _BINS)
    return {
        "nodes": nodes.tolist(), "confidence": confidence.tolist(), "right": right.tolist(),
        "sampled": list(_disagreement(store, part)),
    }  # fmt: skip


def _disagreement(store: GraphStore, part: int) -> tuple[int, int]:
    """Of a sample the nodes with in-neighbours in the same part, and how many are of another class than their mean."""
    ids = store.ids(part)
    if not len(ids):
        return 0, 0
    indptr, indices = store.array("indptr", part), store.array("indices", part)
    rows = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), _SAMPLED)).astype(np.int64))
    sources = [indices[indptr[row] : indptr[row + 1]] for row in rows]
    sources = [each[(each >= ids[0]) & (each <= ids[-1])] for each in sources]
    ends = np.concatenate([[0], np.cumsum([len(each) for each in sources])])
    own_nC = store.gather(SOFT, ids[rows])
    mean_nC = mean_of_sources(store, SOFT, ends, np.concatenate(sources), np.arange(len(rows)), observed_only=False)
    compared_n = own_nC.any(1) & mean_nC.any(1)
    return int(compared_n.sum()), int((own_nC.argmax(1) != mean_nC.argmax(1))[compared_n].sum())


def figures(counts: Iterable[Counts]) -> dict[str, Any]:
    """`confidence` and `calibration_error` (Guo et al., 2017) on validation nodes, and `disagreement` with neighbours.

    `disagreement` is None for a graph whose nodes have no neighbours in their parts.
    """
    every = list(counts)
    nodes, confidence, right = (
        np.sum([each[name] for each in every], axis=0) for name in ("nodes", "confidence", "right")
    )
    compared, differ = np.sum([each["sampled"] for each in every], axis=0)
    total = max(nodes.sum(), 1)
    return {
        "confidence": float(confidence.sum() / total),
        "calibration_error": float(np.abs(confidence - right).sum() / total),
        "disagreement": float(differ / compared) if compared else None,
    }
