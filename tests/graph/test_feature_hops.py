"""Features averaged over hops against powers of the transition matrix."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.graph import feature_hops
from rbm_dist.graph.feature_hops import ARRAYS, add_hops, hop_names
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources.source import SourceGraph
from tests.small_graph import small_graph, with_sparse_features, write_graph

GRAPHS = {"dense": small_graph(), "sparse": with_sparse_features(small_graph()), "int8": small_graph()}


def store_of(url: Path, kind: str) -> GraphStore:
    part_N = np.random.default_rng(9).integers(0, 3, 240).astype(np.int32)
    return write_graph(str(url), GRAPHS[kind], part_N, "int8" if kind == "int8" else "float32")


def powers(graph: SourceGraph, x: np.ndarray, hops: int) -> list[np.ndarray]:
    csc = graph.csc
    mean = sp.csr_array((np.ones(csc.num_edges), csc.indices, csc.indptr), shape=(csc.num_nodes, csc.num_nodes))
    mean = sp.diags_array(1 / np.maximum(np.diff(csc.indptr), 1)) @ mean
    found = []
    for _ in range(hops):
        x = mean @ x
        found.append(x)
    return found


@pytest.mark.parametrize("kind", GRAPHS)
def test_they_are_powers_of_the_mean(tmp_path: Path, kind: str) -> None:
    store = store_of(tmp_path, kind)
    ids = np.arange(240)
    place = store.gather("orig_id", ids)
    x = np.empty((240, store.num_features))
    x[place] = store.gather("feat", ids)
    add_hops(store, 3)
    for name, expected in zip(hop_names(3), powers(GRAPHS[kind], x, 3), strict=True):
        found = store.gather(name, ids)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[place], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_there_is_kept_and_all_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, "dense")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    add_hops(store, 1)
    made: list[str] = []

    def counted(step: feature_hops.Step) -> list[storage.FileInfo]:
        made.append(step.name)
        return feature_hops.fill(step, store, range(store.num_parts))

    add_hops(store, 3, counted)
    assert made == ["hop2", "hop3"]
    (tmp_path / "graph" / "hop3.json").unlink()  # as a kill leaves it
    (tmp_path / "graph" / "hopeful.npy").touch()  # of the user's
    store.remove_matching(ARRAYS)
    (tmp_path / "graph" / "hopeful.npy").unlink()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
