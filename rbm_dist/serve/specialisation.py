"""Whether the experts of a trained RbM differ, and what that is worth: the figures by which it is told from an MLP.

The meaning of every figure: docs/interpret.md.
"""

import copy
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy

from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, rbm_to_mlp
from rbm_dist.moe.sparse_rows import to_rows
from rbm_dist.serve.accuracy import chunks, student_accuracy

LOADED_NODES = 1_000_000
_CPU = torch.device("cpu")


def mixture_figures(mixture: Student, store: GraphStore) -> dict[str, Any]:
    """Figures of an RbM with all its experts, ready for JSON.

    `val`, `test` and `unseen`: its accuracy; `averaged` and `permuted`: that with the experts of each layer averaged
    into one, and with each memory given to the next expert; `distance_per_layer`; `expert_load`, a list per memory,
    and `effective_experts`, the number that would share its rows equally: the exponential of the load's entropy.
    """
    load = expert_load(mixture, store)
    return {
        **student_accuracy(mixture, store),
        "distance_per_layer": distances(mixture),
        "expert_load": load,
        "effective_experts": [float(np.exp(entropy(shares))) for shares in load],
        "averaged": student_accuracy(rbm_to_mlp(mixture), store),
        "permuted": student_accuracy(permuted(mixture), store),
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


def expert_load(student: Student, store: GraphStore) -> list[list[float]]:
    """Per memory the share of (row, expert) pairs that each expert gets; each sums to 1.

    Over all nodes; of a graph of more than `LOADED_NODES` nodes, over so many at equal distances.
    """
    counts = [torch.zeros(len(memory_ED)) for memory_ED in student.memories]
    nodes = np.linspace(0, store.num_nodes, min(store.num_nodes, LOADED_NODES), endpoint=False).astype(np.int64)
    for ids in chunks(nodes):
        with torch.inference_mode():
            _, traces = student(to_rows(store.inputs(ids, student.inputs), _CPU, torch.float32))
        for count, trace in zip(counts, traces, strict=True):
            count += torch.bincount(trace.routing.experts_Bk.flatten(), minlength=len(count))
    return [(count / count.sum()).tolist() for count in counts]
