"""A small input in the sparse `.npz` layout, to be changed and spoilt."""

from typing import Any

import networkx as nx
import numpy as np
import scipy.sparse as sp

Arrays = dict[str, Any]
NODES = 8
# A ring of eight nodes with two classes; two nodes of each split per class but test, which has none of class 1.
LABELS = np.array([0, 1, 0, 1, 0, 1, 0, 0])


def npz_arrays() -> Arrays:
    """A small, good input."""
    ring = nx.to_scipy_sparse_array(nx.cycle_graph(NODES), dtype=np.float32, format="csr")
    attr = sp.csr_array(np.arange(1, 3 * NODES + 1, dtype=np.float32).reshape(NODES, 3))
    arrays: Arrays = {"labels": LABELS.copy()}
    for kind, matrix in (("adj", ring), ("attr", attr)):
        arrays |= {f"{kind}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")}
        arrays[f"{kind}_shape"] = np.array(matrix.shape)
    masks = np.zeros((3, NODES), bool)
    masks[0, [0, 1]] = masks[1, [2, 3]] = masks[2, [4, 6, 7]] = True
    return arrays | dict(zip(("train_mask", "val_mask", "test_mask"), masks, strict=True))


def with_edges(arrays: Arrays, edges: list[tuple[int, int]], num_nodes: int = NODES) -> Arrays:
    """The same input with another adjacency; edges may repeat."""
    src, dst = np.array(edges, np.int64).reshape(-1, 2).T
    order = np.lexsort((dst, src))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(src, minlength=num_nodes))])
    links = {"adj_data": np.ones(len(src), np.float32), "adj_indices": dst[order], "adj_indptr": indptr}
    return arrays | links | {"adj_shape": np.array([num_nodes, num_nodes])}


def without_masks(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if not name.endswith("_mask")}
