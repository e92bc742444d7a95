"""The streaming partitioner: the greedy rule as a plain loop, the capacity of parts, and what further passes gain."""

import math
from pathlib import Path

import networkx as nx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph.csc import Csc, build
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.graph.streaming import stream
from rbm_dist.randomness.bits import mix


def greedy(csc: Csc, num_parts: int, imbalance: float, passes: int, seed: int, weight: list[int]) -> list[int]:
    """Restreamed LDG by its definition; what a pass has not yet reached has its part of the pass before."""
    capacity = math.floor((1 + imbalance) * math.ceil(sum(weight) / num_parts))
    part: dict[int, int] = {}
    for _ in range(passes + 1):
        load = [0] * num_parts
        for v in range(csc.num_nodes):
            near = [part.get(int(u)) for u in csc.indices[csc.indptr[v] : csc.indptr[v + 1]]]
            tie = [int(mix(mix(np.uint64(seed), np.uint64(v)), np.uint64(p))) for p in range(num_parts)]
            score = [near.count(p) * (1 - load[p] / capacity) for p in range(num_parts)]
            fits = [p for p in range(num_parts) if load[p] + weight[v] <= capacity and near.count(p)]
            if fits:
                part[v] = max(fits, key=lambda p: (score[p], tie[p]))
            else:
                part[v] = min(range(num_parts), key=lambda p: (load[p], -tie[p]))
            load[part[v]] += weight[v]
    return [part[v] for v in range(csc.num_nodes)]


@st.composite
def graphs(draw: st.DrawFn) -> Csc:
    num_nodes = draw(st.integers(1, 24))
    ids = st.integers(0, num_nodes - 1)
    edges = np.array(draw(st.lists(st.tuples(ids, ids), max_size=80)), np.int64).reshape(-1, 2)
    return build(edges[:, 0], edges[:, 1], num_nodes, undirected=draw(st.booleans()))


@given(
    csc=graphs(),
    num_parts=st.integers(1, 7),
    imbalance=st.floats(0.01, 1),
    passes=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
    unit=st.sampled_from([(1, 0), (1, 1), (3, 1)]),
)
def test_parts_are_those_of_the_greedy_rule(
    csc: Csc, num_parts: int, imbalance: float, passes: int, seed: int, unit: tuple[int, int]
) -> None:
    weight = [unit[0] + unit[1] * int(degree) for degree in np.diff(csc.indptr)]
    part_N = stream(csc, num_parts, imbalance, passes, seed, *unit)
    assert part_N.dtype == np.int32
    assert part_N.tolist() == greedy(csc, num_parts, imbalance, passes, seed, weight)
    heaviest = np.bincount(part_N, weight, minlength=num_parts).max()
    mean = math.ceil(sum(weight) / num_parts)
    assert heaviest <= max((1 + imbalance) * mean, mean + max(weight) - 1)


def planted(num_nodes: int, degree: int, groups: int, inside: float) -> Csc:
    """Equal groups over shuffled ids; a share `inside` of the edges stays in its group."""
    rng = np.random.default_rng(0)
    size = num_nodes // groups
    src = rng.integers(0, num_nodes, num_nodes * degree // 2)
    group = src // size + np.where(rng.random(len(src)) < inside, 0, rng.integers(1, groups, len(src)))
    dst = group % groups * size + rng.integers(0, size, len(src))
    order = rng.permutation(num_nodes)
    return build(order[src], order[dst], num_nodes, undirected=True)


def test_further_passes_find_the_groups_of_shuffled_nodes() -> None:
    csc = planted(8_000, 30, 8, inside=0.75)
    once, often = (partition_report(csc, stream(csc, 8, 0.03, passes, seed=0), 8)["cut_share"] for passes in (0, 8))
    assert once > 0.6
    assert often < 0.27  # the groups themselves: 0.25


def test_passes_end_when_nothing_changes() -> None:
    csc = planted(400, 20, 4, inside=0.9)
    settled = stream(csc, 4, 0.1, 50, seed=0)
    np.testing.assert_array_equal(stream(csc, 4, 0.1, 10**12, seed=0), settled)


def test_heavy_nodes_do_not_share_a_part() -> None:
    # Two stars: by nodes a part may hold both centres, by edges it may not.
    stars = nx.disjoint_union_all([nx.star_graph(50)] * 2)
    src, dst = np.array(stars.edges).T
    part_N = stream(build(src, dst, 102, undirected=True), 2, 0.03, 5, 0, per_node=1, per_edge=1)
    assert part_N[0] != part_N[51]


def test_edge_offsets_past_32_bits(tmp_path: Path) -> None:
    csc = planted(400, 20, 4, inside=0.9)
    skipped = 2**31 + 5  # a hole in the file, never read
    indices = np.memmap(tmp_path / "indices", np.int32, "w+", shape=(skipped + csc.num_edges,))
    indices[skipped:] = csc.indices
    indices.flush()
    far = Csc(csc.indptr + skipped, np.memmap(tmp_path / "indices", np.int32, "r"))
    np.testing.assert_array_equal(stream(far, 4, 0.03, 3, seed=1), stream(csc, 4, 0.03, 3, seed=1))
