"""The size of a source, told cheaply: from its keys, array headers, table footers or a first block, never the whole.

Only sources that are read as a whole anyway (digits, npz, regions, PyG) are read here too.
"""

import tempfile
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.config.source import OgbConfig, PygConfig, SourceSection, SyntheticConfig, TablesConfig
from rbm_dist.graph.splits import TRAIN, VAL, split_per_class
from rbm_dist.sources import node_columns, source
from rbm_dist.sources.edges import RUN_EDGES
from rbm_dist.sources.streamed import StreamedSource
from rbm_dist.sources.table_look import look_at


@dataclass(frozen=True)
class SourceFacts:
    """What a plan must know of a graph before it is read."""

    num_nodes: int
    num_edges: int  # reverses included where they are added; what coincides is not yet dropped
    num_features: int
    num_classes: int
    num_train: int
    num_val: int
    streamed: bool
    edge_pieces: int = 1  # tasks that read edges, and features
    feat_pieces: int = 1
    edge_piece: int = RUN_EDGES  # given edges that such a task holds at once
    nonzeros: int | None = None  # stored features where they are sparse
    id_bytes: int = 0  # per node, of the caller's ids and their index
    num_test: int | None = None  # None: all other nodes
    note: str = ""  # where the figures come from, if they are not the source's own

    @property
    def num_evaluated(self) -> int:
        """Validation and test nodes, at most."""
        return self.num_nodes - self.num_train if self.num_test is None else self.num_val + self.num_test


# Nodes, edges as given, features, classes; training, validation and test nodes: ogb.stanford.edu/docs/nodeprop.
_PUBLISHED = {
    "ogbn-arxiv": (169_343, 1_166_243, 128, 40, 90_941, 29_799, 48_603),
    "ogbn-products": (2_449_029, 61_859_140, 100, 47, 196_615, 39_323, 2_213_091),
    "ogbn-papers100M": (111_059_956, 1_615_685_872, 128, 172, 1_207_179, 125_265, 214_338),
}


def source_facts(config: SourceSection, seed: int) -> SourceFacts:
    """The size of a configured source. Raises `InputError` as reading it would."""
    match config:
        case SyntheticConfig():
            return _synthetic(config, seed)
        case OgbConfig():
            return _ogb(config)
        case PygConfig():
            return _pyg(config, seed)
        case TablesConfig():
            return _tables(config)
    return _whole(config, seed)


def _synthetic(config: SyntheticConfig, seed: int) -> SourceFacts:
    from rbm_dist.sources.synthetic import PIECE_EDGES, open_synthetic

    opened = open_synthetic(config, seed)
    train, val = (round(share * config.num_nodes) for share in (config.train_share, config.val_share))
    return SourceFacts(
        config.num_nodes, 2 * (opened.num_edges or 0), config.num_features, config.num_classes, train, val, True,
        *_pieces(opened), PIECE_EDGES, num_test=round(config.test_share * config.num_nodes),
    )  # fmt: skip


def _ogb(config: OgbConfig) -> SourceFacts:
    from rbm_dist.sources.ogb import PIECE_EDGES, PIECE_VALUES, ogb_folder, open_ogb

    folder, ways = ogb_folder(config), 1 + config.undirected  # which refuses other datasets
    nodes, edges, features, classes, train, val, test = _PUBLISHED[config.name]
    if not storage.exists(folder):
        pieces = (-(-edges // PIECE_EDGES), -(-nodes * features // PIECE_VALUES))
        return SourceFacts(
            nodes, ways * edges, features, classes, train, val, True, *pieces, num_test=test,
            note=f"published sizes of {config.name}",
        )  # fmt: skip
    opened = open_ogb(config)
    train, val, test = (round(count / nodes * opened.num_nodes) for count in (train, val, test))
    return SourceFacts(
        opened.num_nodes, ways * (opened.num_edges or 0), opened.num_features, opened.num_classes, train, val, True,
        *_pieces(opened), num_test=test,
    )  # fmt: skip


def _pyg(config: PygConfig, seed: int) -> SourceFacts:
    from rbm_dist.sources.pyg import open_pyg

    with tempfile.TemporaryDirectory() as scratch:
        opened = open_pyg(config, scratch)
        nodes = opened.nodes()
        split = nodes.split
        if split is None:
            split = split_per_class(nodes.label, config.train_per_class, config.val_per_class, seed)
        train, val = (int(np.sum(split == code)) for code in (TRAIN, VAL))
        edges = (1 + config.undirected) * (opened.num_edges or 0)
        return SourceFacts(
            opened.num_nodes, edges, opened.num_features, opened.num_classes, train, val, True, *_pieces(opened)
        )


def _whole(config: SourceSection, seed: int) -> SourceFacts:
    graph = source.read(config, seed)
    train, val = (int(np.sum(graph.split == code)) for code in (TRAIN, VAL))
    sparse_chunks = (chunk for chunk in graph.feat_chunks() if isinstance(chunk, sp.csr_array))
    nonzeros = sum(chunk.nnz for chunk in sparse_chunks) if graph.sparse_feat else None
    return SourceFacts(
        graph.csc.num_nodes, graph.csc.num_edges, graph.num_features, graph.num_classes, train, val, False,
        nonzeros=nonzeros,
    )  # fmt: skip


def _tables(config: TablesConfig) -> SourceFacts:
    look = look_at(config)
    classes = config.num_classes or (int(look.scanned.label.max(initial=0)) + 1)
    train, val = classes * config.train_per_class, classes * config.val_per_class
    split_n = look.scanned.split
    if split_n is not None:
        train, val = (round(look.num_nodes * float(np.mean(split_n == code))) for code in (TRAIN, VAL))
    id_bytes = 0
    if look.scanned.id is not None:
        id_bytes = 20 if not look.scanned.id_type.is_named else 12 + 2 * look.scanned.id.dtype.itemsize
    guessed = (
        ""
        if config.num_classes
        else f"classes{' and splits' if split_n is not None else ''} are those of the first rows"
    )
    note = "; ".join(filter(None, ["rows of text are estimated from sizes" if look.estimated else "", guessed]))
    return SourceFacts(
        look.num_nodes, (1 + config.undirected) * look.num_edges, node_columns.widths(look.features), classes,
        train, val, True, len(look.edge_pieces), len(look.pieces), id_bytes=id_bytes, note=note,
    )  # fmt: skip


def _pieces(opened: StreamedSource) -> tuple[int, int]:
    return opened.num_edge_pieces, len(opened.feat_offsets) - 1
