"""Sources that are read in pieces: graphs whose edges and features are never in memory as a whole.

A piece is what one task reads, front to back, in bounded chunks: a file, some row groups, a range of a synthetic graph.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rbm_dist.config.source import SourceSection
from rbm_dist.graph.shards import ROW_NUMBERS, IdType

Edges = tuple[np.ndarray, np.ndarray]
"""Sources and destinations, `[m]` integers each: row numbers of nodes; -1 where an edge to no node is to be dropped."""


@dataclass(frozen=True)
class About:
    """How an input was understood, as far as its reader knows: for people, and for what is to go back to them."""

    class_names: list[str] | None = None  # None: classes are numbers
    id_type: IdType = ROW_NUMBERS
    features: list[tuple[str, str]] | None = None  # the name of each, and its type in the input; None: unnamed
    notes: dict[str, str] = field(default_factory=dict)  # by what they are about: nodes, ids, label, split, edges
    left_out: list[tuple[str, str]] = field(default_factory=list)  # parts of the input that are not used, and why
    warnings: list[str] = field(default_factory=list)
    table: dict[str, Any] | None = None  # how columns become features, for tables of new nodes; None: there are none


@dataclass(frozen=True)
class Nodes:
    """What a source says of all nodes at once, in the order of its rows."""

    label: np.ndarray  # [N] int64, -1 where there is none
    split: np.ndarray | None  # [N] int8: TRAIN, VAL, TEST or NO_SPLIT; None: to be drawn per class
    orig_id: np.ndarray  # [N] int64 or fixed-width bytes ('S'), the caller's ids


@dataclass(frozen=True)
class StreamedSource:
    """A graph in pieces. Every function can be called again, in another process, and gives the same."""

    name: str  # for messages: the path or the dataset
    num_nodes: int
    num_features: int
    num_classes: int
    nodes: Callable[[], Nodes]
    num_edges: int | None  # as given, what will be dropped included; None: not known before they are read
    num_edge_pieces: int
    edges: Callable[[int], Iterator[Edges]]  # of a piece, in chunks; self-loops and duplicates are allowed
    feat_offsets: np.ndarray  # [pieces + 1] int64: piece i has the rows feat_offsets[i] to feat_offsets[i + 1]
    feat: Callable[[int], Iterator[np.ndarray]]  # of a piece, in chunks [n, F] of a float dtype, rows in order
    undirected: bool  # add the reverse of every edge
    about: "About" = field(default_factory=lambda: About())
    fingerprint: str = ""  # of what it is read from; "" where that cannot change


def fingerprint(config: SourceSection, files: list[tuple[str, int, str]]) -> str:
    """16 hex digits of a configuration and the `storage.stamp`s of its files: another once one of these is changed."""
    made_of = json.dumps([config.model_dump(mode="json"), files])
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
