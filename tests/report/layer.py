"""Figures of a layer as they stand in `inspect.json`."""

from typing import Any

import numpy as np


def mixture_figures() -> dict[str, Any]:
    """Figures of a mixture of two layers as they stand in `results.json` and `inspect.json`."""
    return {
        "merged": False, "val": 0.6123, "test": 0.6087, "unseen": None, "distance_per_layer": [0.3, 0.13],
        "expert_load": [[0.5, 0.25, 0.25], [0.5, 0.0, 0.5]], "effective_experts": [2.83, 2.0],
        "averaged": {"val": 0.601, "test": 0.6, "unseen": None},
        "permuted": {"val": 0.502, "test": 0.5, "unseen": None},
    }  # fmt: skip


def layer_figures(num_experts: int, num_classes: int, dead: int = 1) -> dict[str, Any]:
    """Expert `dead` has no rows; the others get random shares of the classes."""
    rng = np.random.default_rng(0)
    experts = []
    for expert in range(num_experts):
        share = rng.dirichlet(np.full(num_classes, 0.3)).tolist()
        figures: dict[str, Any] = {
            "expert": expert, "dead": False, "pair_share": 1 / num_experts, "first_choice_share": 0.125,
            "class": int(np.argmax(share)), "class_name": None, "purity": max(share), "class_share": share,
            "mean_cosine": 0.567,
            "degree_share": [0.3, 0.7], "degree_lift": [0.5, 1.75],
            "nearest": [{"node_id": 100_000_000 + node, "class": 0, "cosine": 0.9} for node in range(5)],
        }  # fmt: skip
        if expert == dead:
            figures |= {"dead": True, "pair_share": 0.0, "first_choice_share": 0.0}
            empty = ("class", "purity", "class_share", "mean_cosine", "degree_share", "degree_lift")
            figures |= dict.fromkeys(empty)
        experts.append(figures)
    return {
        "num_experts": num_experts, "top_k": 3, "load_entropy_bits": 2.25, "load_entropy_max_bits": 3.0,
        "gate_entropy_bits": 1.5, "gate_entropy_max_bits": 1.58, "class_nmi": 0.46, "dead_experts": [dead],
        "closest_memories": {"experts": [0, 2], "cosine": 0.91}, "experts": experts,
    }  # fmt: skip
