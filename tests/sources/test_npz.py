"""Sparse `.npz` graphs: what a file holds is what is read, in whichever layout and number type."""

from pathlib import Path

import numpy as np
import pytest

from rbm_dist.errors import InputError
from rbm_dist.graph.splits import TEST, TRAIN, VAL
from rbm_dist.sources.npz import NpzGraph, read_npz
from rbm_dist.storage import copy_in
from tests.sources.npz_input import LABELS, NODES, Arrays, npz_arrays, without_masks


def read(folder: Path, arrays: Arrays, num_classes: int | None = None) -> NpzGraph:
    np.savez(folder / "graph.npz", **arrays)
    return read_npz(str(folder / "graph.npz"), num_classes)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    graph = read(tmp_path, npz_arrays())
    ring = np.roll(np.eye(NODES), 1, axis=1)
    np.testing.assert_array_equal(graph.adj.toarray(), ring + ring.T)
    np.testing.assert_array_equal(graph.attr.toarray(), np.arange(1, 3 * NODES + 1).reshape(NODES, 3))
    np.testing.assert_array_equal(graph.label, LABELS)
    assert graph.split is not None
    assert graph.split.tolist() == [TRAIN, TRAIN, VAL, VAL, TEST, -1, TEST, TEST]
    assert (graph.attr.dtype, graph.label.dtype, graph.split.dtype) == (np.float32, np.int64, np.int8)
    assert read(tmp_path, without_masks(npz_arrays())).split is None


def test_columns_in_any_order(tmp_path: Path) -> None:
    arrays = npz_arrays()
    for kind in ("adj", "attr"):
        order = np.concatenate(
            [np.arange(*pair)[::-1] for pair in np.c_[arrays[f"{kind}_indptr"][:-1], arrays[f"{kind}_indptr"][1:]]]
        )
        arrays[f"{kind}_indices"], arrays[f"{kind}_data"] = (
            arrays[f"{kind}_indices"][order],
            arrays[f"{kind}_data"][order],
        )
    graph, plain = read(tmp_path, arrays), read(tmp_path, npz_arrays())
    np.testing.assert_array_equal(graph.adj.toarray(), plain.adj.toarray())
    np.testing.assert_array_equal(graph.attr.toarray(), plain.attr.toarray())


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "bool"])
def test_links_of_any_number_type(tmp_path: Path, dtype: str) -> None:
    arrays = npz_arrays()
    graph = read(tmp_path, arrays | {"adj_data": arrays["adj_data"].astype(dtype)})
    assert graph.adj.nnz == 2 * NODES


def test_classes_that_do_not_occur_need_num_classes(tmp_path: Path) -> None:
    assert read(tmp_path, npz_arrays()).num_classes == 2
    assert read(tmp_path, npz_arrays() | {"labels": LABELS * 3}, num_classes=5).num_classes == 5


def test_arrays_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    names = np.array([{"a": 1}, None], object)  # the published files carry pickled names of nodes and classes
    assert read(tmp_path, npz_arrays() | {"node_names": names}).adj.shape == (NODES, NODES)


def test_remote_files_are_read(s3_url: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "graph.npz", **npz_arrays())
    copy_in(tmp_path / "graph.npz", f"{s3_url}/graph.npz")
    assert read_npz(f"{s3_url}/graph.npz").adj.shape == (NODES, NODES)
    with pytest.raises(InputError, match=r"nothing\.npz: no such file"):
        read_npz(f"{s3_url}/nothing.npz")
