"""Sparse `.npz` graphs: `adj_*` and `attr_*` in CSR, `labels`, and masks where there is a public split."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph import csc
from rbm_dist.graph.splits import MASKS, count_classes, split_of_masks
from rbm_dist.sources.streamed import About


@dataclass(frozen=True)
class NpzGraph:
    """What a file holds, checked."""

    adj: sp.csr_array  # [N, N]; entry (u, v) is an edge from u to v, whatever its value
    attr: sp.csr_array  # [N, F] float32, finite
    label: np.ndarray  # [N] int64, -1 where there is none
    num_classes: int
    split: np.ndarray | None  # [N] int8: TRAIN, VAL, TEST or NO_SPLIT; None without masks
    about: About


def read_npz(path: str, num_classes: int | None = None) -> NpzGraph:
    """Read a file on any fsspec URL. Raises `InputError` that names the array for anything missing or malformed.

    `num_classes`: by default the highest label + 1, and every class must then occur.
    """
    arrays, others = _load(path)
    adj = _csr(arrays, "adj", path)
    num_nodes = adj.shape[0]
    if adj.shape[0] != adj.shape[1]:
        raise InputError(f"{path}: adj_shape: an adjacency matrix is square, found {adj.shape[0]} × {adj.shape[1]}")
    if num_nodes == 0:
        raise InputError(f"{path}: adj_shape: the graph has no nodes")
    attr = _csr(arrays, "attr", path)
    if attr.shape[0] != num_nodes:
        raise InputError(f"{path}: attr_shape: {attr.shape[0]:,} feature rows for {num_nodes:,} nodes")
    if attr.shape[1] == 0:
        raise InputError(f"{path}: attr_shape: nodes have no features; a graph-free student needs some")
    with np.errstate(over="ignore"):
        attr.data = attr.data.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(attr.data))
    if len(bad):
        row = int(np.searchsorted(attr.indptr, bad[0], side="right")) - 1
        raise InputError(
            f"{path}: attr_data: {len(bad):,} features are NaN, infinite or beyond float32; "
            f"the first is of node {row}, column {attr.indices[bad[0]]}"
        )
    label = _labels(arrays["labels"], num_nodes, path)
    num_classes = count_classes(label, f"{path}: labels", num_classes)
    split = split_of_masks({name: arrays[name] for name in MASKS if name in arrays}, label, path)
    about = About(
        notes={
            "label": "labels", "edges": "adj", "split": "train_mask, val_mask, test_mask" if split is not None else "",
        },
        left_out=[(name, "no array of this layout") for name in others]
        + [("adj_data", "an edge is its two ends; weights are not used")] * (len(np.unique(adj.data)) > 1),
    )  # fmt: skip
    return NpzGraph(adj, attr, label, num_classes, split, about)


def _load(path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the layout, and the names of others."""
    fs, inner = storage.filesystem(path)
    required = [f"{kind}_{part}" for kind in ("adj", "attr") for part in ("data", "indices", "indptr", "shape")]
    required.append("labels")
    try:
        content = fs.cat_file(inner)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (source.path)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        archive = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # of many kinds: zipfile's, zlib's, numpy's
        raise InputError(f"{path}: not a whole .npz archive: {error}") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: not an .npz archive")
    missing = [name for name in required if name not in archive.files]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing; found {', '.join(archive.files) or 'nothing'}")
    masks = [name for name in MASKS if name in archive.files]
    known = [*required, *masks]
    others = [name for name in archive.files if name not in known]
    return {name: _member(archive, name, path) for name in known}, others


def _member(archive: Any, name: str, path: str) -> np.ndarray:
    try:
        array = archive[name]
    except Exception as error:  # of many kinds, as above
        raise InputError(f"{path}: {name}: not a whole, plain array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: {name}: not an array")
    return array


def _csr(arrays: dict[str, np.ndarray], kind: str, path: str) -> sp.csr_array:
    data, indices, indptr, shape = (arrays[f"{kind}_{part}"] for part in ("data", "indices", "indptr", "shape"))
    if shape.shape != (2,) or not np.issubdtype(shape.dtype, np.integer) or np.any(shape < 0):
        raise InputError(f"{path}: {kind}_shape: two sizes expected, found {shape.dtype} of shape {shape.shape}")
    rows, columns = (int(size) for size in shape)
    wrong = csc.problem(indptr, indices, rows, columns)
    if wrong:
        raise InputError(f"{path}: {kind}: {wrong}")
    if data.shape != indices.shape:
        raise InputError(f"{path}: {kind}_data: shape {data.shape}, but {kind}_indices has shape {indices.shape}")
    if data.dtype.kind not in "fiub":
        raise InputError(f"{path}: {kind}_data: values must be numbers, found dtype {data.dtype}")
    if data.dtype == np.float16:  # unknown to scipy.sparse
        data = data.astype(np.float32)
    return sp.csr_array((data, indices, indptr), shape=(rows, columns))


def _labels(label: np.ndarray, num_nodes: int, path: str) -> np.ndarray:
    if not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"{path}: labels: class ids must be integers, found dtype {label.dtype}")
    if label.shape != (num_nodes,):
        raise InputError(f"{path}: labels: shape {label.shape}, expected ({num_nodes},)")
    return label.astype(np.int64)
