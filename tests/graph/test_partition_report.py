"""The figures of a partition against sets of nodes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph.csc import Csc, build
from rbm_dist.graph.partition_report import partition_report


@given(data=st.data(), num_nodes=st.integers(1, 30), num_parts=st.sampled_from([1, 2, 5, 63, 64, 65, 130]))
def test_figures_are_those_of_sets(data: st.DataObject, num_nodes: int, num_parts: int) -> None:
    ids = st.integers(0, num_nodes - 1)
    edges = np.array(data.draw(st.lists(st.tuples(ids, ids), max_size=90)), np.int64).reshape(-1, 2)
    csc = build(edges[:, 0], edges[:, 1], num_nodes, undirected=False)
    part = data.draw(st.lists(st.integers(0, num_parts - 1), min_size=num_nodes, max_size=num_nodes))
    pairs = [(int(u), v) for v in range(num_nodes) for u in csc.indices[csc.indptr[v] : csc.indptr[v + 1]]]

    report = partition_report(csc, np.array(part, np.int32), num_parts)

    cut = sum(part[u] != part[v] for u, v in pairs)
    nodes = [part.count(p) for p in range(num_parts)]
    into = [[u for u, v in pairs if part[v] == p] for p in range(num_parts)]
    halo = [len({u for u in into[p] if part[u] != p}) for p in range(num_parts)]
    assert report["parts"] == [{"nodes": nodes[p], "edges": len(into[p]), "halo": halo[p]} for p in range(num_parts)]
    assert report["edge_cut"] == cut
    assert report["cut_share"] == pytest.approx(cut / max(len(pairs), 1))
    assert report["node_balance"] == pytest.approx(max(nodes) * num_parts / num_nodes)
    most = max(len(sources) for sources in into)
    assert report["edge_balance"] == pytest.approx(most * num_parts / len(pairs) if pairs else 1.0)
    assert report["replication"] == pytest.approx((num_nodes + sum(halo)) / num_nodes)


def test_a_graph_that_one_can_count() -> None:
    # 0 → 2, 1 → 2, 0 → 3; parts {0, 1} and {2, 3}: the second reads 0 and 1.
    csc = build(np.array([0, 1, 0]), np.array([2, 2, 3]), 4, undirected=False)
    assert partition_report(csc, np.array([0, 0, 1, 1]), 2) == {
        "edge_cut": 3,
        "cut_share": 1.0,
        "node_balance": 1.0,
        "edge_balance": 2.0,
        "replication": 1.5,
        "parts": [{"nodes": 2, "edges": 0, "halo": 0}, {"nodes": 2, "edges": 3, "halo": 2}],
    }


def test_a_mapped_graph(tmp_path: Path) -> None:
    pairs = np.array(list(itertools.combinations(range(9), 2)))
    csc = build(*pairs.T, 9, undirected=True)
    for name, array in (("indptr", csc.indptr), ("indices", csc.indices)):
        np.save(tmp_path / f"{name}.npy", array)
    mapped = Csc(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("indptr", "indices")))
    part_N = np.arange(9, dtype=np.int32) % 3
    report = partition_report(mapped, part_N, 3)
    assert report == partition_report(csc, part_N, 3)
    assert [part["halo"] for part in report["parts"]] == [6, 6, 6]
