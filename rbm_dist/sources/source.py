"""Sources: where a graph comes from. Each gives a checked `SourceGraph`, or one clear `InputError`.

Self-loops and duplicate edges are dropped (and counted), isolated nodes are kept, node ids are the input's row numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from rbm_dist.config.source import (
    DigitsConfig,
    NpzConfig,
    OgbConfig,
    PygConfig,
    RegionsConfig,
    SourceSection,
    SyntheticConfig,
    TablesConfig,
)
from rbm_dist.errors import InputError
from rbm_dist.graph import csc as csc_
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.splits import UNSEEN, check_split, hidden_split, split_per_class
from rbm_dist.sources import regions
from rbm_dist.sources.npz import read_npz
from rbm_dist.sources.ogb import open_ogb
from rbm_dist.sources.streamed import About, StreamedSource
from rbm_dist.sources.synthetic import open_synthetic
from rbm_dist.sources.tables import open_tables

_FEATURE_ROWS = 8192
# Features of which fewer are non-zero are kept as a sparse matrix, on disk and in the first layer of every model.
_SPARSE = 0.2


@dataclass(frozen=True)
class SourceGraph:
    """A whole graph as its source gives it: structure and labels in memory, features in chunks of rows, unscaled."""

    csc: Csc
    num_features: int
    num_classes: int
    label: np.ndarray  # [N] int64, -1 where there is none
    split: np.ndarray  # [N] int8: TRAIN, VAL, TEST, UNSEEN or NO_SPLIT
    feat_chunks: Callable[[], Iterator[np.ndarray | sp.csr_array]]  # [n, F] float32 each, rows in order, of one kind
    read_edges: int  # as given, before any was dropped
    dropped_self_loops: int
    dropped_duplicates: int
    sparse_feat: bool = False  # whether the chunks are sparse
    orig_id: np.ndarray | None = None  # [N] int64, the input's row numbers; None: all rows are there
    about: About = field(default_factory=About)


def is_streamed(config: SourceSection) -> bool:
    """Whether a source is read in pieces (`open_streamed`) or as a whole (`read`)."""
    return isinstance(config, OgbConfig | PygConfig | SyntheticConfig | TablesConfig)


def open_streamed(config: SourceSection, seed: int, scratch: str) -> StreamedSource:
    """Open a source that is read in pieces. `scratch`: a folder for files derived from it, such as an index of ids."""
    match config:
        case OgbConfig():
            return open_ogb(config)
        case PygConfig():
            from rbm_dist.sources.pyg import open_pyg  # brings torch, which no other task of the stage needs

            return open_pyg(config, scratch)
        case SyntheticConfig():
            return open_synthetic(config, seed)
        case TablesConfig():
            return open_tables(config, scratch)
    raise TypeError(f"{type(config).__name__} is not a streamed source")


def read(config: SourceSection, seed: int) -> SourceGraph:
    """Read and check the configured source."""
    match config:
        case DigitsConfig():
            graph = _read_digits(config, seed)
        case NpzConfig():
            graph = _read_npz(config, seed)
        case RegionsConfig():
            graph = _read_regions(config, seed)
        case _:
            raise TypeError(f"{type(config).__name__} is not read as a whole")
    check_split(config.path if isinstance(config, NpzConfig) else config.kind, graph.label, graph.split)
    return hide_unseen(graph, config.unseen_share, seed) if config.unseen_share else graph


def hide_unseen(graph: SourceGraph, share: float, seed: int) -> SourceGraph:
    """The inductive setting: a seeded share of the test nodes becomes UNSEEN, and no edge leads from them to others.

    An unseen node keeps its own in-edges, as a node that arrives later has them; nothing can reach training from it.
    """
    split = hidden_split(graph.split, share, seed)
    unseen = split == UNSEEN
    dst_M = csc_.destinations(graph.csc)
    keep_M = unseen[dst_M] | ~unseen[graph.csc.indices]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst_M[keep_M], minlength=len(split)))])
    return replace(graph, split=split, csc=Csc(indptr, graph.csc.indices[keep_M]))


def _read_digits(config: DigitsConfig, seed: int) -> SourceGraph:
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph
    from threadpoolctl import threadpool_limits

    digits = load_digits()
    if config.neighbors >= len(digits.data):
        raise InputError(f"source.neighbors: {config.neighbors} neighbours, but there are {len(digits.data)} images")
    with threadpool_limits(1):  # of images that are as near, other threads find others
        links = kneighbors_graph(digits.data, config.neighbors, mode="connectivity", include_self=False).tocoo()
    label = digits.target.astype(np.int64)
    return _assemble(
        *(links.row, links.col, len(label), True),
        sp.csr_array(digits.data), label, int(label.max()) + 1,
        split_per_class(label, config.train_per_class, config.val_per_class, seed),
        About(notes={"nodes": "scikit-learn's digit images", "edges": f"{config.neighbors} nearest neighbours"}),
    )  # fmt: skip


def _read_regions(config: RegionsConfig, seed: int) -> SourceGraph:
    drawn = regions.generate(config, seed)
    return SourceGraph(
        csc=drawn.csc,
        num_features=config.num_features,
        num_classes=config.num_classes,
        label=drawn.label,
        split=split_per_class(drawn.label, config.train_per_class, config.val_per_class, seed),
        feat_chunks=drawn.feat_chunks,
        read_edges=drawn.csc.num_edges // 2,
        dropped_self_loops=0,
        dropped_duplicates=0,
    )


def _read_npz(config: NpzConfig, seed: int) -> SourceGraph:
    given = read_npz(config.path, config.num_classes)
    adj, attr, label, split = given.adj, given.attr, given.label, given.split
    orig_id = None
    if config.largest_component:
        orig_id = _largest_component(adj)
        adj, attr, label = adj[orig_id][:, orig_id], attr[orig_id], label[orig_id]
        split = None if split is None else split[orig_id]
    if split is None:
        split = split_per_class(label, config.train_per_class, config.val_per_class, seed)
    links = adj.tocoo()
    about = given.about
    graph = _assemble(links.row, links.col, len(label), config.undirected, attr, label, given.num_classes, split, about)
    return replace(graph, orig_id=orig_id)


def _largest_component(adj: sp.csr_array) -> np.ndarray:
    """The nodes of the largest weakly connected component, ascending."""
    _, component = connected_components(adj, directed=False)
    return np.flatnonzero(component == np.bincount(component).argmax())


def _assemble(
    src: np.ndarray,
    dst: np.ndarray,
    num_nodes: int,
    undirected: bool,
    attr: sp.csr_array,
    label: np.ndarray,
    num_classes: int,
    split: np.ndarray,
    about: About,
) -> SourceGraph:
    csc = csc_.build(src, dst, num_nodes, undirected)
    loops = int(np.sum(src == dst))
    distinct = len(np.unique(src.astype(np.int64)[src != dst] * num_nodes + dst[src != dst]))

    # Which adds up duplicates; no sum of float32 numbers overflows float64.
    attr = attr.astype(np.float64).astype(np.float32)
    sparse = attr.nnz < _SPARSE * num_nodes * attr.shape[1]

    def feat_chunks() -> Iterator[np.ndarray | sp.csr_array]:
        for start in range(0, num_nodes, _FEATURE_ROWS):
            rows = attr[start : start + _FEATURE_ROWS]
            yield rows if sparse else rows.toarray()

    return SourceGraph(
        csc=csc,
        num_features=attr.shape[1],
        num_classes=num_classes,
        label=label,
        split=split,
        feat_chunks=feat_chunks,
        read_edges=len(src),
        dropped_self_loops=loops,
        dropped_duplicates=len(src) - loops - distinct,
        sparse_feat=sparse,
        about=about,
    )
