"""What a hop-precomputed teacher reads of some nodes: rows, and no neighbourhood."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rbm_dist.graph.feature_hops import hop_names
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.hop_networks import HopNetwork
from rbm_dist.randomness.rows import derive_keys


@dataclass(frozen=True)
class HopRows:
    """Features of some nodes and their means over hops, side by side, in CPU memory."""

    rows_nD: Tensor  # float32
    node_n: Tensor  # int64 ids
    key: int  # draws the dropout
    num_edges: int = 0  # none is sampled,
    asked: int = 0  # nor any row of another host's kept
    hits: int = 0


def read_hops(store: GraphStore, ids: np.ndarray, hops: int, key: int, device: torch.device) -> HopRows:
    """Gather the rows of some nodes, for a model on `device`, on which nothing is done yet."""
    arrays = [store.gather(name, ids) for name in ("feat", *hop_names(hops))]
    rows_nD, node_n = torch.from_numpy(np.concatenate(arrays, axis=1)), torch.from_numpy(ids)
    if device.type == "cuda":  # from pinned memory it is copied while the GPU computes
        rows_nD, node_n = rows_nD.pin_memory(), node_n.pin_memory()
    return HopRows(rows_nD, node_n, key)


def hop_states(model: HopNetwork, batch: HopRows, training: bool = False) -> tuple[Tensor, Tensor]:
    """Logits `[n, classes]` and the states before the last layer `[n, H]`."""
    device = model.temperature.device
    key_n = derive_keys(batch.key, batch.node_n.to(device, non_blocking=True)) if training else None
    return model.forward_hidden(batch.rows_nD.to(device, non_blocking=True), key_n)
