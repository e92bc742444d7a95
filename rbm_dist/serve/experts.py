"""What the experts of a trained RbM do: how rows spread over them, and which classes and degrees each one gets.

One pass over all nodes in bounded memory: sums per expert, the few nodes nearest to each memory, and a seeded sample
of rows for a 2-D map. The meaning of every figure: docs/interpret.md.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score
from torch import Tensor

from rbm_dist.graph.shards import ORIG_NAME
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, Trace
from rbm_dist.moe.routing import Routing
from rbm_dist.moe.sparse_rows import dense, matmul, to_rows, unit
from rbm_dist.randomness.bits import generator
from rbm_dist.randomness.words import Word
from rbm_dist.report.expert_pictures import InputMap
from rbm_dist.sources import node_ids

ARRAYS = ("label", "orig_id", ORIG_NAME, "indptr")
"""The arrays of a graph that the figures need besides a student's inputs."""
_ROWS = 4_096
_MAP_ROWS = 2_000
_NEAREST = 5
_QUANTILES = (0.25, 0.5, 0.75)


def expert_figures(student: Student, store: GraphStore, names: tuple[str, ...]) -> dict[str, Any]:
    """Figures of every memory (`layers`: those that choose experts) and expert over all nodes, ready for JSON.

    `names` are the student's inputs. A row counts for each of its experts with its routing weight, unless "share of
    pairs" (each of its k experts counts alike) or "first choice" is said. Figures without rows to speak of are None.
    """
    buckets, bucket_share = _degree_buckets(store)
    top_k = student.routed_layers[0].top_k
    sums = [_Sums(memory_ED, top_k, store.num_classes, len(bucket_share)) for memory_ED in student.memories]
    class_C = np.zeros(store.num_classes, np.int64)
    for ids, degree_B in _chunks(store):
        label_B = store.gather("label", ids)
        class_C += np.bincount(label_B[label_B >= 0], minlength=store.num_classes)
        bucket_B = np.searchsorted(buckets[:-1], degree_B)
        for each, trace in zip(sums, _traces(student, store, ids, names), strict=True):
            each.add(ids, trace, label_B, bucket_B)
    lowest = [0, *(last + 1 for last in buckets[:-1])]
    return {
        "num_nodes": store.num_nodes,
        "labelled_nodes": int(class_C.sum()),
        "class_names": store.class_names,
        "class_share": _shares(class_C),
        "degree_buckets": [
            {"from": first, "to": last, "share": share}
            for first, last, share in zip(lowest, buckets, bucket_share, strict=True)
        ],
        "layers": [each.figures(store, bucket_share) for each in sums],
    }


def input_maps(student: Student, store: GraphStore, names: tuple[str, ...], seed: int) -> list[InputMap]:
    """Per memory the first two principal components of its normalised inputs and memories.

    At most 2,000 rows, drawn by the seed.
    """
    rows = min(_MAP_ROWS, store.num_nodes)
    ids = np.sort(generator(seed, Word.INSPECTED_ROWS).choice(store.num_nodes, rows, replace=False, shuffle=False))
    maps = []
    for memory_ED, trace in zip(student.memories, _traces(student, store, ids, names), strict=True):
        unit_SD = F.normalize(torch.cat([dense(trace.x_BD), memory_ED]), dim=1)
        pca = PCA(2, random_state=0)
        at = pca.fit_transform(F.pad(unit_SD, (0, 1)).numpy())  # a column of zeros, for inputs of width one
        maps.append(InputMap(at[:rows], store.gather("label", ids), at[rows:], pca.explained_variance_ratio_))
    return maps


class _Sums:
    """What is summed over the rows that one memory routes."""

    def __init__(self, memory_ED: Tensor, top_k: int, num_classes: int, num_buckets: int):
        experts = len(memory_ED)
        self.memory_ED, self.top_k = memory_ED, top_k
        self.rows, self.gate_entropy = 0, 0.0
        self.pairs_E = np.zeros(experts, np.int64)
        self.cosine_E = np.zeros(experts)
        # A last column for nodes without a label: that is where −1 leads.
        self.first_EC = np.zeros((experts, num_classes + 1), np.int64)
        self.mass_EC = np.zeros((experts, num_classes + 1))
        self.mass_EQ = np.zeros((experts, num_buckets))
        self.near_cosine_nE = torch.empty(0, experts)
        self.near_id_nE = torch.empty(0, experts, dtype=torch.int64)

    def add(self, ids: np.ndarray, trace: Trace, label_B: np.ndarray, bucket_B: np.ndarray) -> None:
        """Count some rows."""
        experts_Bk, weights_Bk, cosines_Bk = _as_numpy(trace.routing)
        self.rows += len(ids)
        self.gate_entropy += float(entropy(weights_Bk, base=2, axis=1).sum())
        np.add.at(self.pairs_E, experts_Bk, 1)
        np.add.at(self.cosine_E, experts_Bk, cosines_Bk)
        np.add.at(self.first_EC, (experts_Bk[:, 0], label_B), 1)
        np.add.at(self.mass_EC, (experts_Bk, label_B[:, None]), weights_Bk)
        np.add.at(self.mass_EQ, (experts_Bk, bucket_B[:, None]), weights_Bk)
        cosines_BE = matmul(unit(trace.x_BD), F.normalize(self.memory_ED, dim=1).T.contiguous())
        near = cosines_BE.topk(min(_NEAREST, len(ids)), dim=0)
        cosine = torch.cat([self.near_cosine_nE, near.values])
        node = torch.cat([self.near_id_nE, torch.from_numpy(ids)[near.indices]])
        self.near_cosine_nE, order = cosine.topk(min(_NEAREST, len(cosine)), dim=0)
        self.near_id_nE = node.gather(0, order)

    def figures(self, store: GraphStore, bucket_share: list[float]) -> dict[str, Any]:
        """The layer's figures; see docs/interpret.md."""
        first_EC = self.first_EC[:, :-1]
        marginals = [entropy(counts) for counts in (first_EC.sum(0), first_EC.sum(1))] if first_EC.any() else [0.0]
        return {
            "num_experts": len(self.pairs_E),
            "top_k": self.top_k,
            "load_entropy_bits": float(entropy(self.pairs_E, base=2)),
            "load_entropy_max_bits": float(np.log2(len(self.pairs_E))),
            "gate_entropy_bits": self.gate_entropy / self.rows,
            "gate_entropy_max_bits": float(np.log2(self.top_k)),
            "class_nmi": float(mutual_info_score(None, None, contingency=first_EC) / np.mean(marginals))
            if np.any(marginals)
            else None,
            "closest_memories": _closest(self.memory_ED),
            "dead_experts": np.flatnonzero(self.pairs_E == 0).tolist(),
            "experts": [self._expert(expert, store, bucket_share) for expert in range(len(self.pairs_E))],
        }

    def _expert(self, expert: int, store: GraphStore, bucket_share: list[float]) -> dict[str, Any]:
        pairs = int(self.pairs_E[expert])
        class_share = _shares(self.mass_EC[expert, :-1])
        degree_share = _shares(self.mass_EQ[expert])
        ids = self.near_id_nE[:, expert].numpy()
        nearest = zip(_shown_ids(store, ids), store.gather("label", ids), self.near_cosine_nE[:, expert], strict=True)
        cls = None if class_share is None else int(np.argmax(class_share))
        return {
            "expert": expert,
            "dead": pairs == 0,
            "pair_share": pairs / int(self.pairs_E.sum()),
            "first_choice_share": int(self.first_EC[expert].sum()) / self.rows,
            "class": cls,
            "class_name": None if cls is None or store.class_names is None else store.class_names[cls],
            "purity": None if class_share is None else max(class_share),
            "class_share": class_share,
            "degree_share": degree_share,
            "degree_lift": degree_share
            and [part / whole for part, whole in zip(degree_share, bucket_share, strict=True)],
            "mean_cosine": float(self.cosine_E[expert]) / pairs if pairs else None,
            "nearest": [
                {"node_id": node, "class": int(label) if label >= 0 else None, "cosine": float(cosine)}
                for node, label, cosine in nearest
            ],
        }


def _shown_ids(store: GraphStore, ids: np.ndarray) -> list[int | str]:
    """The caller's ids of some nodes, as JSON has them: bytes in hexadecimal digits."""
    kept = store.gather(ORIG_NAME if store.named else "orig_id", ids)
    found = node_ids.to_arrow(kept, store.id_type).to_pylist()
    found = [each.hex() if isinstance(each, bytes) else each for each in found]
    return [each if isinstance(each, int | str) else str(each) for each in found]


def _chunks(store: GraphStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and in-degrees of all nodes, some thousands at a time."""
    for part in range(store.num_parts):
        ids, indptr = store.ids(part), store.array("indptr", part)
        for start in range(0, len(ids), _ROWS):
            yield ids[start : start + _ROWS], np.diff(indptr[start : start + _ROWS + 1])


def _traces(student: Student, store: GraphStore, ids: np.ndarray, names: tuple[str, ...]) -> list[Trace]:
    with torch.inference_mode():
        return student(to_rows(store.inputs(ids, names), torch.device("cpu"), torch.float32))[1]


def _degree_buckets(store: GraphStore) -> tuple[list[int], list[float]]:
    """The highest in-degree of each quarter of the nodes, and its share of them; fewer where degrees coincide."""
    counts_D = np.zeros(1, np.int64)
    for _, degree_B in _chunks(store):
        chunk_D = np.bincount(degree_B)
        counts_D = np.pad(counts_D, (0, max(0, len(chunk_D) - len(counts_D))))
        counts_D[: len(chunk_D)] += chunk_D
    up_to_D = counts_D.cumsum()
    highest = np.searchsorted(up_to_D, [quantile * store.num_nodes for quantile in _QUANTILES])
    buckets = np.unique([*highest, len(counts_D) - 1])
    return buckets.tolist(), (np.diff(up_to_D[buckets], prepend=0) / store.num_nodes).tolist()


def _closest(memory_ED: Tensor) -> dict[str, Any] | None:
    """The two memories with the highest cosine."""
    if len(memory_ED) == 1:
        return None
    unit_ED = F.normalize(memory_ED, dim=1)
    cosines_EE = (unit_ED @ unit_ED.T).fill_diagonal_(-torch.inf)
    pair = divmod(int(cosines_EE.argmax()), len(memory_ED))
    return {"experts": sorted(pair), "cosine": float(cosines_EE[pair])}


def _shares(amounts: np.ndarray) -> list[float] | None:
    total = amounts.sum()
    return (amounts / total).tolist() if total else None


def _as_numpy(routing: Routing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts, weights and cosines of the routing; float64, so that sums over many rows stay exact."""
    return routing.experts_Bk.numpy(), routing.weights_Bk.double().numpy(), routing.cosines_Bk.double().numpy()
