"""The on-disk layout: one folder per part, nodes renumbered so that a part owns one contiguous id range.

    graph.json                 version, counts, dtypes, part offsets, checksums; written last
    part-00003/indptr.npy      CSC: in-edges of the part's own nodes
               indices.npy     ids of the sources
               feat.npy label.npy split.npy orig_id.npy

Laid end to end, the parts are the whole graph's CSC. Plain `.npy`, see docs/on-disk-format.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rbm_dist import storage
from rbm_dist.graph.csc import Csc, id_dtype
from rbm_dist.graph.source import SourceGraph

VERSION = 1
_ROWS = 65_536
# The arrays of a staged source, in the source's own node order.
SOURCE_ARRAYS = ("indptr", "indices", "feat", "label", "split")


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def write_source(url: str, graph: SourceGraph) -> dict[str, storage.FileInfo]:
    """Stage a source's arrays in its own node order, for the partitioner and the shards to read."""
    num_nodes = graph.csc.num_nodes
    whole = {"indptr": graph.csc.indptr, "indices": graph.csc.indices, "label": graph.label, "split": graph.split}
    files = {
        f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), array) for name, array in whole.items()
    }
    shape = (num_nodes, graph.num_features)
    files["feat.npy"] = storage.write_chunks(storage.join(url, "feat.npy"), np.float32, shape, graph.feat_chunks())
    return files


@dataclass(frozen=True)
class StagedSource:
    """A staged source, memory-mapped."""

    csc: Csc
    feat: np.ndarray  # [N, F] float32
    label: np.ndarray  # [N] int64
    split: np.ndarray  # [N] int8

    @classmethod
    def open(cls, url: str, files: dict[str, storage.FileInfo]) -> "StagedSource":
        arrays = {
            name: storage.open_array(storage.join(url, f"{name}.npy"), files[f"{name}.npy"]) for name in SOURCE_ARRAYS
        }
        return cls(Csc(arrays["indptr"], arrays["indices"]), arrays["feat"], arrays["label"], arrays["split"])


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

    def write(
        name: str, dtype: np.dtype, row: tuple[int, ...], chunks: Iterator[np.ndarray] | list[np.ndarray]
    ) -> None:
        path = f"{part_name(part)}/{name}.npy"
        rows = len(indptr) if name == "indptr" else len(indices) if name == "indices" else len(nodes)
        files[path] = storage.write_chunks(storage.join(url, path), dtype, (rows, *row), chunks)

    def rows_of(array: np.ndarray) -> Iterator[np.ndarray]:
        return (array[nodes[start : start + _ROWS]] for start in range(0, len(nodes), _ROWS))

    write("indptr", indptr.dtype, (), [indptr])
    write("indices", indices.dtype, (), [indices])
    write("feat", source.feat.dtype, source.feat.shape[1:], rows_of(source.feat))
    write("label", source.label.dtype, (), rows_of(source.label))
    write("split", source.split.dtype, (), rows_of(source.split))
    write("orig_id", np.dtype(np.int64), (), [nodes.astype(np.int64)])
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
    arrays = {"feat": source.feat, "label": source.label, "split": source.split}
    storage.write_json(
        storage.join(url, "graph.json"),
        {
            "version": VERSION,
            "num_nodes": source.csc.num_nodes,
            "num_edges": source.csc.num_edges,
            "num_features": source.feat.shape[1],
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
