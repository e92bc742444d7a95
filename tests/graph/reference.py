"""Random graphs for property tests, and what is true of a graph and of a sample, by brute force over sets of edges."""

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from rbm_dist.graph.csc import Csc
from rbm_dist.graph.sampler import Sample


@dataclass(frozen=True)
class Graph:
    """A directed graph as the set of its edges (source, destination)."""

    num_nodes: int
    edges: frozenset[tuple[int, int]]

    def in_neighbours(self, node: int) -> list[int]:
        return sorted(src for src, dst in self.edges if dst == node)

    def csc(self) -> Csc:
        columns = [self.in_neighbours(node) for node in range(self.num_nodes)]
        indptr = np.cumsum([0, *map(len, columns)]).astype(np.int64)
        return Csc(indptr, np.array([src for column in columns for src in column], np.int32))


@st.composite
def graphs(draw: st.DrawFn, max_nodes: int = 14) -> Graph:
    """Directed graphs without self-loops, from empty to complete."""
    num_nodes = draw(st.integers(1, max_nodes))
    density = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = np.argwhere((rng.random((num_nodes, num_nodes)) < density) & ~np.eye(num_nodes, dtype=bool))
    return Graph(num_nodes, frozenset(map(tuple, chosen.tolist())))


@st.composite
def cuts(draw: st.DrawFn, num_nodes: int) -> np.ndarray:
    """Offsets that cut the ids into one to five contiguous parts, some of them empty."""
    inner = draw(st.lists(st.integers(0, num_nodes), max_size=4))
    return np.array([0, *sorted(inner), num_nodes], np.int64)


def cut(csc: Csc, offsets: np.ndarray) -> list[Csc]:
    """The parts of a graph that own these contiguous ranges of ids."""
    parts = []
    for first, end in itertools.pairwise(offsets):
        low, high = csc.indptr[first], csc.indptr[end]
        parts.append(Csc(csc.indptr[first : end + 1] - low, csc.indices[low:high].copy()))
    return parts


def check_sample(graph: Graph, sample: Sample, seeds: list[int], fanout: tuple[int, ...]) -> None:
    """Assert everything that holds for every sample, whatever was drawn."""
    nodes = sample.nodes.tolist()
    assert nodes[: len(seeds)] == list(seeds)
    assert len(set(nodes)) == len(nodes)
    assert len(sample.nodes_per_hop) == len(fanout) + 1
    assert len(sample.edges_per_hop) == len(fanout)
    assert sample.nodes_per_hop[0] == len(seeds)
    assert sum(sample.nodes_per_hop) == len(nodes)
    assert sum(sample.edges_per_hop) == len(sample.src) == len(sample.dst)
    assert np.all(np.diff(sample.dst) >= 0)
    node_ends, edge_ends = np.cumsum(sample.nodes_per_hop), np.cumsum([0, *sample.edges_per_hop])
    known = len(seeds)
    for hop, width in enumerate(fanout):
        frontier = range(node_ends[hop] - sample.nodes_per_hop[hop], node_ends[hop])
        drawn: dict[int, list[int]] = {at: [] for at in frontier}
        for edge in range(edge_ends[hop], edge_ends[hop + 1]):
            drawn[int(sample.dst[edge])].append(int(sample.src[edge]))
        for at, sources in drawn.items():
            neighbours = graph.in_neighbours(nodes[at])
            ids = [nodes[src] for src in sources]
            assert len(set(ids)) == len(ids), "an edge was drawn twice"
            assert set(ids) <= set(neighbours), "an edge that is not in the graph"
            assert len(ids) == (len(neighbours) if width < 0 else min(width, len(neighbours)))
        found = {src for sources in drawn.values() for src in sources if src >= known}
        assert found == set(range(known, node_ends[hop + 1])), "the hop's new nodes are those it found"
        known = int(node_ends[hop + 1])
