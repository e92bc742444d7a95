"""Whether the experts of a trained RbM differ, and what that is worth: the figures by which it is told from an MLP.

The meaning of every figure: docs/interpret.md.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy

from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, rbm_to_mlp
from rbm_dist.moe.sparse_rows import to_rows
from rbm_dist.serve.accuracy import CPU, Hits, chunks, student_hits

LOADED_NODES = 1_000_000


def mixture_figures(mixture: Student, store: GraphStore) -> dict[str, Any]:
    """`summary` of an RbM on a whole graph."""
    counted = {name: student_hits(variant, store) for name, variant in variants(mixture).items()}
    return summary(mixture, counted, expert_rows(mixture, store))


def variants(mixture: Student) -> dict[str, Student]:
    """The RbM with all its experts, with those of each layer averaged, and with permuted memories."""
    return {"whole": mixture, "averaged": rbm_to_mlp(mixture), "permuted": permuted(mixture)}


def summary(mixture: Student, counted: Mapping[str, Hits], rows_ME: list[np.ndarray]) -> dict[str, Any]:
    """Figures of an RbM with all its experts, ready for JSON. counted: of each of its `variants`; see `expert_rows`.

    `val`, `test` and `unseen`: its accuracy; `averaged` and `permuted`: that with the experts of each layer averaged
    into one, and with each memory given to the next expert; `distance_per_layer`; `expert_load`, a list per memory,
    and `effective_experts`, the number that would share its rows equally: the exponential of the load's entropy.
    """
    load = expert_load(rows_ME)
    return {
        **counted["whole"].accuracy(),
        "distance_per_layer": distances(mixture),
        "expert_load": load,
        "effective_experts": [float(np.exp(entropy(shares))) for shares in load],
        "averaged": counted["averaged"].accuracy(),
        "permuted": counted["permuted"].accuracy(),
    }


@torch.no_grad()
def distances(mixture: Student) -> list[float]:
    """Per layer `‖W_e − mean‖ / ‖W‖`, both as root mean squares over the experts: 0 for copies, up to 1."""
    found = []
    for layer in mixture.routed_layers:
        weight_EDO = layer.experts.scaled_weight.double()
        apart = (weight_EDO - weight_EDO.mean(0)).norm()
        found.append(float(apart / weight_EDO.norm().clamp_min(1e-300)))
    return found


def permuted(mixture: Student) -> Student:
    """The same RbM with each memory given to the next expert: what it computes if it does not matter who is asked."""
    other = copy.deepcopy(mixture)
    other.set_memories([memory_ED.roll(1, 0) for memory_ED in other.memories])
    return other


def expert_rows(
    student: Student, store: GraphStore, parts: Iterable[int] | None = None, device: torch.device = CPU
) -> list[np.ndarray]:
    """Per memory how many (row, expert) pairs each expert gets `[E]`, in some parts (default: all).

    Over all nodes; of a graph of more than `LOADED_NODES` nodes, over so many at equal distances. The student is
    moved to the device.
    """
    student = student.eval().to(device)
    rows_ME = [np.zeros(len(memory_ED), np.int64) for memory_ED in student.memories]
    nodes = np.linspace(0, store.num_nodes, min(store.num_nodes, LOADED_NODES), endpoint=False).astype(np.int64)
    for part in range(store.num_parts) if parts is None else parts:
        first, last = np.searchsorted(nodes, store.offsets[part : part + 2])
        for ids in chunks(nodes[first:last]):
            with torch.inference_mode():
                _, traces = student(to_rows(store.inputs(ids, student.inputs), device, torch.float32))
            for rows_E, trace in zip(rows_ME, traces, strict=True):
                rows_E += np.bincount(trace.routing.experts_Bk.flatten().cpu().numpy(), minlength=len(rows_E))
    return rows_ME


def expert_load(rows_ME: list[np.ndarray]) -> list[list[float]]:
    """Per memory the share of (row, expert) pairs that each expert gets; each sums to 1."""
    return [(rows_E.astype(np.float32) / np.float32(rows_E.sum())).tolist() for rows_E in rows_ME]
