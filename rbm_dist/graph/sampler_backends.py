"""The optional sampling kernels, pyg-lib and torch-sparse, behind the built-in kernel's interface.

Both hold the whole graph's CSC in memory, and draw from torch's global generator, seeded by the key and then restored.
"""

from collections.abc import Mapping

import numpy as np
import torch

from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.sampler import NumbaSampler, RemoteEdges, Sample, Sampler


def make_sampler(
    name: str, parts: Mapping[int, Csc], offsets: np.ndarray, remote: RemoteEdges | None = None
) -> Sampler:  # fmt: skip
    """The kernel of that name over the parts held here. Raises `InputError` if its package is not installed."""
    if name == "numba":
        return NumbaSampler(parts, offsets, remote)
    if len(parts) < len(offsets) - 1:
        raise InputError(
            f"teacher.sampler: {name} needs all parts on this host; use numba, or cluster.shard_servers: 0"
        )
    backend: type[PygLibSampler] | type[TorchSparseSampler] = PygLibSampler if name == "pyg_lib" else TorchSparseSampler
    try:
        return backend([parts[part] for part in sorted(parts)])
    except ImportError as error:
        package = name.replace("_", "-")
        raise InputError(f"teacher.sampler: {name}: {package} is not installed ({error}); see docs/start.md") from None


class PygLibSampler:
    """`torch.ops.pyg.neighbor_sample`."""

    def __init__(self, parts: list[Csc]):
        import pyg_lib  # noqa: F401  (registers the operator)

        self._indptr, self._indices = _whole(parts)

    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> Sample:
        checked = _checked(seeds, len(self._indptr) - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key & (2**63 - 1))
            # Arguments: CSC, seeds, fan-out; node, edge and seed times, edge weights; csc, replace, directed, disjoint,
            # temporal strategy, return edge ids.
            src, dst, nodes, _edges, nodes_per_hop, edges_per_hop = torch.ops.pyg.neighbor_sample(
                *(self._indptr, self._indices, checked, list(fanout)),
                *(None, None, None, None, True, False, True, False, "uniform", True),
            )
        return Sample(nodes.numpy(), src.numpy(), dst.numpy(), list(nodes_per_hop), list(edges_per_hop))


class TorchSparseSampler:
    """`torch.ops.torch_sparse.neighbor_sample`.

    Not uniform: of more neighbours than the fan-out, the last ones come up less often (seen in 0.6.18).
    """

    def __init__(self, parts: list[Csc]):
        import torch_sparse  # noqa: F401  (registers the operator)

        self._indptr, self._indices = _whole(parts)

    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> Sample:
        checked = _checked(seeds, len(self._indptr) - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key & (2**63 - 1))
            nodes, src, dst, _edges = torch.ops.torch_sparse.neighbor_sample(
                self._indptr, self._indices, checked, list(fanout), False, True
            )
        src_m, dst_m = src.numpy(), dst.numpy()
        # The operator does not report hops. Edges come in order of destination, and destinations are met hop by hop.
        nodes_per_hop, edges_per_hop = [len(seeds)], []
        met, done = len(seeds), 0
        for _ in fanout:
            end = int(np.searchsorted(dst_m, met))
            edges_per_hop.append(end - done)
            grown = max(met, int(src_m[done:end].max(initial=-1)) + 1)
            nodes_per_hop.append(grown - met)
            met, done = grown, end
        return Sample(nodes.numpy(), src_m, dst_m, nodes_per_hop, edges_per_hop)


def _checked(seeds: np.ndarray, num_nodes: int) -> torch.Tensor:
    """The seeds, of which the operators check nothing."""
    if len(seeds) and (np.min(seeds) < 0 or np.max(seeds) >= num_nodes):
        raise ValueError(f"seeds must lie in [0, {num_nodes})")
    if len(np.unique(seeds)) < len(seeds):
        raise ValueError("seeds must be distinct")
    return torch.from_numpy(np.ascontiguousarray(seeds, np.int64))


def _whole(parts: list[Csc]) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole graph's CSC from its parts laid end to end; int64, which both kernels take."""
    indptr, num_edges = [np.zeros(1, np.int64)], 0
    for csc in parts:
        indptr.append(csc.indptr[1:] + num_edges)
        num_edges += csc.num_edges
    indices = np.concatenate([csc.indices for csc in parts]).astype(np.int64)
    return torch.from_numpy(np.concatenate(indptr)), torch.from_numpy(indices)
