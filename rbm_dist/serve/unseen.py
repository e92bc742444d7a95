"""Encodings of new nodes: an edge list ties them to nodes that a run's graph knows, whose encodings they are made of.

As a run does it for its own unseen nodes: the mean of the observed in-neighbours' rows, scaled as theirs
(docs/method.md). Held in memory: per node of the graph 30 bytes and its id; per new node the same; per edge 16 bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.propagate import SCALES, mean_of_sources
from rbm_dist.graph.shards import ORIG_NAME, IdType
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.format import ModelFile
from rbm_dist.serve.tables import NodeTable, ReadOptions, all_ids, said_as_options
from rbm_dist.sources import node_ids, table_files, table_schema
from rbm_dist.sources.pieces import At

_EDGES = 1 << 18  # edges in a batch


@dataclass(frozen=True)
class EdgeOptions:
    """The edges of new nodes."""

    edges: str  # file, folder or pattern
    run: str  # whose graph has the nodes at their other ends
    src: str = "src"
    dst: str = "dst"
    unknown_nodes: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True)
class NewEdges:
    """The in-edges of the rows of one file: a CSC whose sources are nodes of the graph."""

    indptr: np.ndarray  # [rows + 1] int64
    indices: np.ndarray  # int64


class Encoder:
    """Gives the encodings of some rows of a file, `[n, width]` float32 by name."""

    def __init__(self, store: GraphStore, edges: NewEdges, names: Sequence[str]):
        self._store, self._edges, self._names = store, edges, names

    def __call__(self, start: int, stop: int) -> dict[str, np.ndarray]:
        rows = np.arange(start, stop)
        means = {
            name: mean_of_sources(self._store, name, self._edges.indptr, self._edges.indices, rows, observed_only=True)
            for name in self._names
        }
        return {name: SCALES[name](mean_nD) for name, mean_nD in means.items()}


def encodings_of(model: ModelFile) -> list[str]:
    """The inputs of a student that come from edges."""
    return [name for name in model.inputs if name != "feat"]


def open_known(run: str, model: ModelFile) -> GraphStore:
    """The graph of a run with the encodings that a student needs; what is read of it is verified.

    Raises `InputError` if it is not there, damaged, or not the graph that the student learned from.
    """
    url = storage.join(storage.absolute(run), "graph")
    if not storage.exists(storage.join(url, "graph.json")):
        raise InputError(f"{run}: not a run with a graph (no graph/graph.json); edges need it (--graph)")
    store = GraphStore.open(url)
    learned = model.made_from.get("graph", {})
    for name in ("num_nodes", "num_edges", "num_features", "num_classes"):
        if name in learned and learned[name] != getattr(store, name):
            raise InputError(
                f"{url}: is not the graph that the student learned from: {name} is {getattr(store, name):,}, there "
                f"{learned[name]:,} (--graph)"
            )
    files = storage.read_json(storage.join(url, "graph.json"))["files"]
    for name in encodings_of(model):
        index = storage.join(url, f"{name}.json")
        if not storage.exists(index):
            raise InputError(f"{url}: its nodes have no '{name}', which the student learned from (--graph)")
        files |= storage.read_json(index)["files"]
    read = {id_array(store), "split", *encodings_of(model)}
    storage.verify(url, {file: info for file, info in files.items() if file.rsplit("/", 1)[-1][:-4] in read})
    for name in encodings_of(model):
        if store.width((name,)) != model.inputs[name]:
            raise InputError(
                f"{url}: '{name}' has {store.width((name,))} columns, the student learned from {model.inputs[name]}"
            )
    return store


def new_edges(
    tables: Sequence[NodeTable], store: GraphStore, options: EdgeOptions, reading: ReadOptions
) -> list[NewEdges]:
    """The in-edges of the rows of each file, each once, self-loops left out.

    Edges between new nodes say nothing: neither has an encoding yet. Raises `InputError` for ids that occur twice and,
    unless they are to be dropped, for edges to ids that are neither new nor the graph's.
    """
    config = reading.tables(
        options.run, edges=options.edges, src=options.src, dst=options.dst, id_type=id_type_of(store),
    )  # fmt: skip
    undirected = _is_undirected(options.run)
    new_N = [all_ids(table, store.id_type) for table in tables]
    offsets = np.cumsum([0, *map(len, new_N)])

    def at(row: int) -> str:
        file = int(np.searchsorted(offsets, row, side="right")) - 1
        return f"{tables[file].file.url}: row {row - offsets[file]}"

    new = node_ids.index(np.concatenate(new_N), store.id_type, at) if offsets[-1] else None
    known_N = known_ids(store)
    known = node_ids.index(known_N, store.id_type, lambda row: f"{store.url}: node {row}")
    words: list[np.ndarray] = []  # new row · N + known node
    for src, dst in _pairs(config, store, new, known, options):
        for (_, from_M), (to_M, _) in ((src, dst), (dst, src))[: 1 + undirected]:
            both = (from_M >= 0) & (to_M >= 0)
            words.append(np.unique(to_M[both] * store.num_nodes + from_M[both]))
    row_E, source_E = np.divmod(np.unique(np.concatenate([np.empty(0, np.int64), *words])), store.num_nodes)
    bounds = np.searchsorted(row_E, np.arange(offsets[-1] + 1))
    return [
        NewEdges(bounds[low : high + 1] - bounds[low], source_E[bounds[low] : bounds[high]])
        for low, high in pairwise(offsets)
    ]


End = tuple[np.ndarray, np.ndarray]
"""The rows of an end of some edges among the new nodes, and among the graph's; -1 where it is none."""


def _pairs(
    config: TablesConfig, store: GraphStore, new: node_ids.NodeIds | None, known: node_ids.NodeIds, options: EdgeOptions
) -> Iterator[tuple[End, End]]:
    for ends in read_ends(config, options.edges, "--edges", store.id_type):
        found = []
        for end in ends:
            new_M, known_M = (rows_of(index, end) for index in (new, known))
            neither_M = (new_M < 0) & (known_M < 0)
            if options.unknown_nodes == "refuse" and neither_M.any():
                raise unknown_node(end, neither_M)
            # A node that is given as a new one is no neighbour of itself.
            found.append((new_M, known_M))
        same_M = (found[0][0] == found[1][0]) & (found[0][0] >= 0)
        yield tuple((np.where(same_M, -1, new_M), known_M) for new_M, known_M in found)  # type: ignore[misc]


class ReadEnd(NamedTuple):
    """One end of some edges, as a file has it."""

    name: str  # of the column
    column: pa.Array
    at: At  # says where a row is
    id_M: np.ndarray
    wrong_M: np.ndarray | None  # which can be no id at all; None: all can


def read_ends(config: TablesConfig, url: str, option: str, of: IdType) -> Iterator[list[ReadEnd]]:
    """Sources and destinations of the edges in some files, in batches. option: where `url` is from, for messages."""
    with said_as_options():
        files = [stamp[0] for stamp in table_files.find(url, option)]
        ends, types, pieces = table_schema.edges(config, files, of)
        types = {name: types[name] for name in ends}
        for piece in pieces:
            for batch, start in table_files.placed_batches(piece, types, _EDGES):
                at = partial(piece.at, start)
                columns = [(name, batch.column(name), at) for name in ends]
                yield [ReadEnd(*each, *node_ids.from_arrow(each[1], of, each[0], at)) for each in columns]


def rows_of(index: node_ids.NodeIds | None, end: ReadEnd) -> np.ndarray:
    """The row of each node in an index of ids, −1 where it is not in it."""
    if index is None:
        return np.full(len(end.id_M), -1)
    row_M, unknown_M = index.rows(end.id_M)
    return np.where(unknown_M if end.wrong_M is None else unknown_M | end.wrong_M, -1, row_M).astype(np.int64)


def unknown_node(end: ReadEnd, unknown_M: np.ndarray) -> InputError:
    """What to say of ids that are of no node."""
    first = int(unknown_M.argmax())
    return InputError(
        f"{end.at(first)}, column {end.name}: {end.column[first].as_py()!r} is neither a new node nor one of the "
        f"graph's, and so are {int(unknown_M.sum()):,} of these {len(unknown_M):,} ids. --unknown-nodes drop leaves "
        "such edges out"
    )


def known_ids(store: GraphStore) -> np.ndarray:
    """The caller's ids of all nodes of a graph, in the order of its ids."""
    return np.concatenate([store.array(id_array(store), part) for part in range(store.num_parts)])


def id_array(store: GraphStore) -> str:
    """The array of the caller's ids."""
    return ORIG_NAME if store.named else "orig_id"


def id_type_of(store: GraphStore) -> Literal["auto", "integer", "text"]:
    """How tables that name nodes of a graph are to read ids: `source.id_type`."""
    kind = store.id_type.kind
    return "text" if kind == "text" else "auto" if kind == "bytes" else "integer"


def _is_undirected(run: str) -> bool:
    """Whether a run counts edges in both directions, as its configuration says."""
    url = storage.join(storage.absolute(run), "config.json")
    if not storage.exists(url):
        raise InputError(
            f"{url}: not there, and it says whether edges count in both directions; copy it with the graph"
        )
    return bool(storage.read_json(url).get("source", {}).get("undirected", True))
