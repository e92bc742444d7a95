"""What a teacher reads of some seeds: their sampled neighbourhood, and an input of each node of it.

A batch is made in two halves: `read_sample` asks the store, in a thread that works ahead; `states` is the model's.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from rbm_dist.config.run import Config
from rbm_dist.graph.presampling import fill_hot
from rbm_dist.graph.propagate import in_degree
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.gnn import Gnn, Neighbourhood
from rbm_dist.moe.sparse_rows import Rows, dense, to_rows
from rbm_dist.randomness.bits import key
from rbm_dist.randomness.rows import derive_keys, keyed_normal
from rbm_dist.randomness.words import Word

_HOT_BATCHES = 64  # sampled to find the nodes that are needed most


@dataclass(frozen=True)
class SampledRows:
    """What a model reads of some seeds, in CPU memory: their sampled neighbourhood and an input of each node of it."""

    rows_nD: Rows  # float32
    neighbourhood: Neighbourhood
    key: int  # drew the sample, and draws the dropout
    asked: int  # rows of other hosts' nodes, where some of them are kept here
    hits: int  # and how many of these were here

    @property
    def num_edges(self) -> int:
        return self.neighbourhood.edge_2m.shape[1]

    def to(self, device: torch.device) -> tuple[Rows, Neighbourhood]:
        """Rows and neighbourhood where the model is."""
        if device.type == "cpu":
            return self.rows_nD, self.neighbourhood
        near = self.neighbourhood
        rows_nD, node_n, edge_2m = (
            each.to(device, non_blocking=True) for each in (dense(self.rows_nD), near.node_n, near.edge_2m)
        )
        degree_n = None if near.degree_n is None else near.degree_n.to(device, non_blocking=True)
        return rows_nD, Neighbourhood(node_n, edge_2m, near.nodes_per_hop, near.edges_per_hop, degree_n)


def read_sample(
    store: GraphStore,
    seeds: np.ndarray,
    fanout: tuple[int, ...],
    sample_key: int,
    device: torch.device,
    inputs: tuple[str, ...] = ("feat",),
    degrees: bool = False,
) -> SampledRows:
    """Sample, and gather the nodes' `inputs`, for a model on `device`, on which nothing is done yet.

    degrees: whether the model is told the nodes' in-degrees in the whole graph.
    """
    sample = store.sample(seeds, fanout, sample_key)
    rows = store.inputs(sample.nodes, inputs)
    gpu = device.type == "cuda"
    if gpu and not isinstance(rows, np.ndarray):
        rows = rows.toarray()
    rows_nD = to_rows(rows, torch.device("cpu"), torch.float32)
    node_n, edge_2m = torch.from_numpy(sample.nodes), torch.from_numpy(np.stack([sample.src, sample.dst]))
    degree_n = torch.from_numpy(in_degree(store, sample.nodes).astype(np.float32)) if degrees else None
    if gpu:  # from pinned memory it is copied while the GPU computes
        rows_nD, node_n, edge_2m = (each.pin_memory() for each in (dense(rows_nD), node_n, edge_2m))
    neighbourhood = Neighbourhood(node_n, edge_2m, sample.nodes_per_hop, sample.edges_per_hop, degree_n)
    return SampledRows(rows_nD, neighbourhood, sample_key, *(store.hot.take_counts() if store.hot else (0, 0)))


def states(
    model: Gnn, sampled: SampledRows, training: bool = False, noise_key: int | None = None
) -> tuple[torch.Tensor, Rows]:
    """Logits of the seeds, `[seeds, classes]`, and their states before the last layer, `[seeds, H]`.

    `noise_key` adds noise to all inputs.
    """
    rows_nD, neighbourhood = sampled.to(next(model.parameters()).device)
    if noise_key is not None:
        rows_nD = add_noise(rows_nD, sampled.neighbourhood.node_n.numpy(), noise_key)
    return model.forward_hidden(rows_nD, neighbourhood, sampled.key if training else None)


def sample_logits(
    model: Gnn, store: GraphStore, seeds: np.ndarray, fanout: tuple[int, ...], sample_key: int, training: bool
) -> torch.Tensor:
    """Logits of some nodes from their sampled neighbourhood, `[len(seeds), classes]`; nothing is done ahead."""
    device = next(model.parameters()).device
    sampled = read_sample(store, seeds, fanout, sample_key, device, degrees=model.reads_degrees)
    return states(model, sampled, training)[0]


def add_noise(feat_nF: Rows, nodes: np.ndarray, noise_key: int) -> torch.Tensor:
    """Features plus unit Gaussian noise that belongs to each node, whoever asks for it."""
    feat_nF = dense(feat_nF)
    keys = derive_keys(noise_key, torch.from_numpy(nodes).to(feat_nF.device))
    return feat_nF + keyed_normal(keys, feat_nF.shape[1], feat_nF.dtype)


def keep_hot(store: GraphStore, config: Config, steps: list[list[np.ndarray]], fanout: tuple[int, ...]) -> None:
    """Keep the feature rows of other hosts' nodes that these steps need most, if so configured."""
    budget = config.cluster.cache_mb * 10**6
    if budget and len(store.held_parts) < store.num_parts and not store.sparse_features:
        seeds = [np.concatenate(shares) for shares in steps if any(map(len, shares))][:_HOT_BATCHES]
        draws = (key(config.seed, Word.TEACHER_HOT_ROWS, draw) for draw in range(_HOT_BATCHES))
        fill_hot(store, "feat", budget, zip(itertools.cycle(seeds), draws, strict=False), fanout)
