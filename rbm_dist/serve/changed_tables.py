"""What has changed since a run's graph was made, from tables: new nodes and edges, edges that are gone, other features.

Tables are read as those of new nodes (`tables.py`, `unseen.py`). All changes are held in memory: per new node its
features, per edge 32 bytes; of the graph's nodes 30 bytes and their ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.sparse as sp

from rbm_dist.config.source import SourceConfig, TablesConfig
from rbm_dist.config.update import UpdateConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.changes import Changes, both_lists, edge_list, no_rows
from rbm_dist.graph.shards import ORIG_NAME
from rbm_dist.graph.splits import NO_SPLIT, UNSEEN
from rbm_dist.graph.store import GraphStore, StoredRows
from rbm_dist.serve.features import FeatureReader
from rbm_dist.serve.format import ModelFile
from rbm_dist.serve.loaded import SCALING
from rbm_dist.serve.tables import NodeTable, ReadOptions, open_tables, read_columns, said_as_options
from rbm_dist.serve.unseen import id_type_of, known_ids, read_ends, rows_of, unknown_node
from rbm_dist.sources import node_columns, node_ids
from rbm_dist.sources.node_columns import Labels
from rbm_dist.sources.scaling import Scaling


def read_changes(
    update: UpdateConfig, source: SourceConfig, store: GraphStore, model: ModelFile, tensors: Mapping[str, np.ndarray]
) -> tuple[Changes, dict[str, int]]:
    """The changes, and what was read. `store`: the graph so far; `model` and `tensors`: of one of its students.

    Raises `InputError` for what cannot be read or is of no node, a new node that is there already, or one that is given
    twice, classes and splits that the graph has not, and an edge that is both new and gone.
    """
    reader = _Reader(update, source, store, model, _scaling(model, tensors))
    new = reader.nodes(update.add_nodes, "--add-nodes") if update.add_nodes else reader.none()
    known_N = known_ids(store)
    every = np.concatenate([known_N, new.id])

    def at(row: int) -> str:
        what = "a node of the graph" if row < len(known_N) else new.at(row - len(known_N))
        return what if row < len(known_N) else f"{what} (--add-nodes: new nodes alone; --features: others)"

    index = node_ids.index(every, store.id_type, at)
    gone, unknown = np.empty((0, 2), np.int64), 0
    added = gone
    if update.add_edges:
        added, unknown = reader.edges(update.add_edges, "--add-edges", index, new.split)
    if update.drop_edges:
        gone, more = reader.edges(update.drop_edges, "--drop-edges", index, new.split)
        unknown += more
    both = both_lists(added, gone)
    if len(both):
        dst, src = (node_ids.shown(every[node], store.id_type) for node in both[0])
        raise InputError(f"{update.drop_edges}: the edge from {src} to {dst} is also among --add-edges; decide for one")
    changed, feat = np.empty(0, np.int64), no_rows(store.num_features, store.sparse_features)
    if update.features:
        others = reader.nodes(update.features, "--features")
        row_n, missing = node_ids.index(known_N, store.id_type, at).rows(others.id)
        if missing.any():
            first = int(missing.argmax())
            raise InputError(
                f"{others.at(first)}: the graph has no node {node_ids.shown(others.id[first], store.id_type)}, and "
                f"{int(missing.sum()):,} of these {len(missing):,} (--features; new nodes: --add-nodes)"
            )
        order = np.argsort(row_n, kind="stable")
        changed, feat = row_n[order].astype(np.int64), others.feat[order]
        twice = np.flatnonzero(changed[1:] == changed[:-1])
        if len(twice):
            raise InputError(f"{others.at(int(order[twice[0] + 1]))}: the node is given twice (--features)")
    arrays = {"label": new.label, "split": new.split, "orig_id": new.id}
    if store.named:  # then orig_id numbers the rows of the node table, of which these come after all others
        last = max(int(store.array("orig_id", part).max(initial=-1)) for part in range(store.num_parts))
        arrays |= {"orig_id": last + 1 + np.arange(len(new.id)), ORIG_NAME: new.id}
    counts = {"nodes": len(new.id), "features": len(changed), "unknown": unknown}
    return Changes(arrays, new.feat, added, gone, changed, feat), counts


@dataclass(frozen=True)
class _Nodes:
    """The rows of a table of nodes."""

    id: np.ndarray
    feat: StoredRows
    label: np.ndarray
    split: np.ndarray
    places: list[tuple[int, str]]  # the rows up to each file's end, and its name

    def at(self, row: int) -> str:
        first = 0
        for end, name in self.places:
            if row < end:
                return f"{name}: row {row - first}"
            first = end
        raise AssertionError


@dataclass(frozen=True)
class _Reader:
    update: UpdateConfig
    source: SourceConfig
    store: GraphStore
    model: ModelFile
    scaling: Scaling

    def none(self) -> _Nodes:
        store = self.store
        ids = np.empty(0, "S1" if store.named else np.int64)
        feat = no_rows(store.num_features, store.sparse_features)
        return _Nodes(ids, feat, np.empty(0, np.int64), np.empty(0, np.int8), [])

    def nodes(self, url: str, option: str) -> _Nodes:
        """All rows of a table of nodes."""
        reader = FeatureReader(self.model.features)
        options = ReadOptions(id=self.update.id)
        label, split = (self._column(name) for name in ("label", "split"))
        tables = open_tables(url, self.model, reader.column_types, options, option, (label, split))
        parts: list[_Nodes] = []
        places: list[tuple[int, str]] = []
        none = self.none()
        with said_as_options():
            for table in tables:
                found = self._table(table, reader, label, split)
                parts.append(found)
                places.append(((places[-1][0] if places else 0) + len(found.id), table.file.url))
        if not any(len(each.id) for each in parts):
            raise InputError(f"{url}: no rows ({option})")
        stack: Any = sp.vstack if self.store.sparse_features else np.concatenate
        feat = stack([none.feat, *(each.feat for each in parts)])
        columns = ((getattr(each, name) for each in (none, *parts)) for name in ("id", "label", "split"))
        id_n, label_n, split_n = (np.concatenate(list(each)) for each in columns)
        return _Nodes(id_n, sp.csr_array(feat) if self.store.sparse_features else feat, label_n, split_n, places)

    def edges(self, url: str, option: str, index: node_ids.NodeIds, new_split: np.ndarray) -> tuple[np.ndarray, int]:
        """The edges of a table, in both directions where the graph has them so, and how many ends were of no node."""
        own = self._tables()
        config = TablesConfig(
            nodes="", edges=url, id_type=id_type_of(self.store), src=self.update.src or own.src,
            dst=self.update.dst or own.dst,
        )  # fmt: skip
        src_parts, dst_parts, unknown = [], [], 0
        for ends in read_ends(config, url, option, self.store.id_type):
            rows = [rows_of(index, end) for end in ends]
            for end, row_M in zip(ends, rows, strict=True):
                if self.update.unknown_nodes == "refuse" and (row_M < 0).any():
                    raise unknown_node(end, row_M < 0)
            known = (rows[0] >= 0) & (rows[1] >= 0)
            unknown += int((~known).sum())
            src_parts.append(rows[0][known])
            dst_parts.append(rows[1][known])
        src, dst = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (src_parts, dst_parts))
        if self.source.symmetric:
            src, dst = np.concatenate([src, dst]), np.concatenate([dst, src])
        # As in the source: an unseen node's edges lead to it, not from it.
        split = np.concatenate([*(self.store.array("split", part) for part in range(self.store.num_parts)), new_split])
        shown = (split[dst] == UNSEEN) | (split[src] != UNSEEN)
        return edge_list(dst[shown], src[shown]), unknown

    def _table(self, table: NodeTable, reader: FeatureReader, label: str, split: str) -> _Nodes:
        """The rows of one file."""
        names = [name for name in (label, split) if name in table.file.columns]
        ids, feats, labels, splits = [], [], Labels(self._tables().unlabelled), []
        for batch, id_n, at in read_columns(table, self.store.id_type, names):
            feat_nF = reader.from_batch(batch, at)
            ids.append(id_n)
            feats.append(self._scaled(feat_nF))
            if label in names:
                labels.add(batch.column(label), label, at)
            none = np.full(len(id_n), NO_SPLIT, np.int8)
            splits.append(node_columns.split(batch.column(split), split, at) if split in names else none)
        rows = sum(map(len, ids))
        if not rows:
            return self.none()
        stack: Any = sp.vstack if self.store.sparse_features else np.concatenate
        label_n = self._classes(labels, table.file.url, label) if label in names else np.full(rows, -1)
        split_n = np.concatenate(splits)
        bare = (split_n != NO_SPLIT) & (label_n < 0)
        if bare.any():
            raise InputError(
                f"{table.file.url}: row {int(bare.argmax())}: the node is in a split but has no label, as are "
                f"{int(bare.sum()):,} in all (columns {label} and {split}; --label, --split)"
            )
        return _Nodes(np.concatenate(ids), stack(feats), label_n, split_n, [])

    def _scaled(self, feat_nF: np.ndarray) -> StoredRows:
        """Features as they are learned from."""
        if not self.store.sparse_features:
            return cast(np.ndarray, self.scaling.apply(feat_nF))
        feat_nF = np.where(np.isnan(feat_nF), self.scaling.fill, feat_nF).astype(np.float32)
        return self.scaling.apply(sp.csr_array(feat_nF))

    def _classes(self, labels: Labels, url: str, label: str) -> np.ndarray:
        """Labels as the graph numbers its classes."""
        label_n, classes = labels.finish()
        names = self.store.class_names
        if names is not None:
            given = (
                classes.names if classes.names is not None else list(map(str, range(int(label_n.max(initial=-1)) + 1)))
            )
            place = {name: code for code, name in enumerate(names)}
            used = np.unique(label_n[label_n >= 0]).tolist()
            other = [given[code] for code in used if given[code] not in place]
            if other:
                raise InputError(f"{url}: column {label}: the graph has no class {other[0]!r}; it has {_some(names)}")
            return np.array([*(place.get(name, -1) for name in given), -1], np.int64)[label_n]
        wrong = (label_n >= self.store.num_classes) | (label_n < -1)
        if classes.names or wrong.any():
            what = repr(classes.names[0]) if classes.names else str(label_n[int(wrong.argmax())])
            raise InputError(
                f"{url}: column {label}: the graph has no class {what}; its classes are 0 to "
                f"{self.store.num_classes - 1}"
            )
        return label_n

    def _column(self, name: str) -> str:
        given = getattr(self.update, name)
        return str(given if given is not None else getattr(self._tables(), name) or name)

    def _tables(self) -> TablesConfig:
        """The run's own tables, if it was made of some, else what they are called by default."""
        return self.source if isinstance(self.source, TablesConfig) else TablesConfig(nodes="", edges="")


def _scaling(model: ModelFile, tensors: Mapping[str, np.ndarray]) -> Scaling:
    columns, indicators = (tensors[name] for name in SCALING)
    fill, shift, factor = columns
    return Scaling(fill, shift, factor, model.features.rows, indicators)


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + " …" * (len(names) > 10)
