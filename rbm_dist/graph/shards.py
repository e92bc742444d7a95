"""The on-disk layout: one folder per part, nodes renumbered so that a part owns one contiguous id range.

    graph.json                 version, counts, dtypes, part offsets, checksums; written last
    part-00003/indptr.npy      CSC: in-edges of the part's own nodes
               indices.npy     ids of the sources
               feat.npy label.npy split.npy orig_id.npy

Sparse features are four arrays in place of `feat`: feat_indptr, feat_indices, feat_values, feat_shape, a CSR matrix.
Laid end to end, the parts are the whole graph's CSC. Plain `.npy`, see docs/on-disk-format.md.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.graph.csc import Csc, id_dtype
from rbm_dist.graph.source import SourceGraph

VERSION = 2
_ROWS = 65_536
SPARSE_FEAT = ("feat_indptr", "feat_indices", "feat_values", "feat_shape")


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def write_source(url: str, graph: SourceGraph) -> dict[str, storage.FileInfo]:
    """Stage a source's arrays in its own node order, for the partitioner and the shards to read."""
    num_nodes = graph.csc.num_nodes
    orig_id = np.arange(num_nodes) if graph.orig_id is None else graph.orig_id
    whole = {
        "indptr": graph.csc.indptr, "indices": graph.csc.indices, "label": graph.label, "split": graph.split,
        "orig_id": orig_id.astype(np.int64),
    }  # fmt: skip
    if graph.sparse_feat:
        whole |= sparse_arrays(sp.vstack(list(graph.feat_chunks()), format="csr"))
    files = {
        f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), array) for name, array in whole.items()
    }
    if not graph.sparse_feat:
        shape = (num_nodes, graph.num_features)
        files["feat.npy"] = storage.write_chunks(storage.join(url, "feat.npy"), np.float32, shape, graph.feat_chunks())
    return files


def sparse_arrays(feat: sp.csr_array) -> dict[str, np.ndarray]:
    """The arrays of sparse features. Both index arrays have one dtype, so that scipy maps them without a copy."""
    dtype = id_dtype(max(feat.nnz, *feat.shape))
    indptr, indices = feat.indptr.astype(dtype), feat.indices.astype(dtype)
    arrays = (indptr, indices, feat.data.astype(np.float32), np.array(feat.shape, np.int64))
    return dict(zip(SPARSE_FEAT, arrays, strict=True))


def sparse_matrix(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: np.ndarray) -> sp.csr_array:
    """The CSR matrix `[rows, features]` over such arrays, memory-mapped if they are."""
    return sp.csr_array((values, indices, indptr), shape=tuple(shape.tolist()), copy=False)


@dataclass(frozen=True)
class StagedSource:
    """A staged source, memory-mapped."""

    csc: Csc
    feat: np.ndarray | sp.csr_array  # [N, F] float32
    label: np.ndarray  # [N] int64
    split: np.ndarray  # [N] int8
    orig_id: np.ndarray  # [N] int64

    @classmethod
    def open(cls, url: str, files: dict[str, storage.FileInfo]) -> "StagedSource":
        def array(name: str) -> np.ndarray:
            return storage.open_array(storage.join(url, f"{name}.npy"), files[f"{name}.npy"])

        sparse = f"{SPARSE_FEAT[0]}.npy" in files
        feat = sparse_matrix(*map(array, SPARSE_FEAT)) if sparse else array("feat")
        return cls(Csc(array("indptr"), array("indices")), feat, array("label"), array("split"), array("orig_id"))


@dataclass(frozen=True)
class Numbering:
    """The renumbering that makes each part's nodes contiguous."""

    order: np.ndarray  # [N] the source's id of each new id
    new_id: np.ndarray  # [N] the new id of each of the source's ids
    offsets: np.ndarray  # [P + 1] part p owns the new ids offsets[p] to offsets[p + 1]

    @classmethod
    def of(cls, part_N: np.ndarray, num_parts: int) -> "Numbering":
        order = np.argsort(part_N, kind="stable")
        new_id = np.empty(len(order), id_dtype(len(order)))
        new_id[order] = np.arange(len(order))
        offsets = np.zeros(num_parts + 1, np.int64)
        np.cumsum(np.bincount(part_N, minlength=num_parts), out=offsets[1:])
        return cls(order, new_id, offsets)


def write_part(url: str, part: int, source: StagedSource, numbering: Numbering) -> dict[str, storage.FileInfo]:
    """Write all arrays of one part; gives the checksum of each file, by its path below `url`."""
    nodes = numbering.order[numbering.offsets[part] : numbering.offsets[part + 1]]
    indptr, indices = _in_edges(source.csc, nodes, numbering.new_id)
    files = {}

    def write(name: str, array: np.ndarray) -> None:
        path = f"{part_name(part)}/{name}.npy"
        files[path] = storage.write_array(storage.join(url, path), array)

    def write_rows(name: str, array: np.ndarray) -> None:
        path = f"{part_name(part)}/{name}.npy"
        chunks = (array[nodes[start : start + _ROWS]] for start in range(0, len(nodes), _ROWS))
        shape = (len(nodes), *array.shape[1:])
        files[path] = storage.write_chunks(storage.join(url, path), array.dtype, shape, chunks)

    write("indptr", indptr)
    write("indices", indices)
    if isinstance(source.feat, np.ndarray):
        write_rows("feat", source.feat)
    else:
        for name, array in sparse_arrays(source.feat[nodes]).items():
            write(name, array)
    for name, array in (("label", source.label), ("split", source.split), ("orig_id", source.orig_id)):
        write_rows(name, array)
    return files


def write_index(
    url: str,
    numbering: Numbering,
    source: StagedSource,
    num_classes: int,
    files: dict[str, storage.FileInfo],
    edge_cut: int,
) -> None:
    """Write `graph.json`: from here on the graph is there."""
    sparse = not isinstance(source.feat, np.ndarray)
    arrays = sparse_arrays(source.feat) if sparse else {"feat": source.feat}
    arrays |= {"label": source.label, "split": source.split}
    storage.write_json(
        storage.join(url, "graph.json"),
        {
            "version": VERSION,
            "num_nodes": source.csc.num_nodes,
            "num_edges": source.csc.num_edges,
            "num_features": source.feat.shape[1],
            "sparse_features": sparse,
            "num_classes": num_classes,
            "offsets": numbering.offsets.tolist(),
            "edge_cut": edge_cut,
            "dtypes": {name: str(array.dtype) for name, array in arrays.items()}
            | {"indptr": "int64", "indices": str(source.csc.indices.dtype), "orig_id": "int64"},
            "files": files,
        },
    )


def _in_edges(csc: Csc, nodes: np.ndarray, new_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The CSC of the in-edges of `nodes`, with sources renumbered and ascending per node."""
    starts, counts = csc.indptr[nodes], csc.indptr[nodes + 1] - csc.indptr[nodes]
    indptr = np.zeros(len(nodes) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    edges = np.repeat(starts - indptr[:-1], counts) + np.arange(indptr[-1])
    sources = new_id[csc.indices[edges]]
    rows = np.repeat(np.arange(len(nodes)), counts)
    return indptr, sources[np.lexsort((sources, rows))]
