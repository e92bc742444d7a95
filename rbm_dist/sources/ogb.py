"""Node classification datasets of the Open Graph Benchmark (Hu et al., 2020), streamed from OGB's own raw files.

The files are those that OGB's archives hold, gzipped CSV or one `.npz`, below `<root>/<dataset>/`. The package `ogb`
is not needed to read them: it would load a dataset whole, which takes some 150 GB of memory for ogbn-papers100M.
"""

import gzip
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from rbm_dist import storage
from rbm_dist.config.source import OgbConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL, count_classes, whole_labels
from rbm_dist.sources.streamed import About, Edges, Nodes, StreamedSource, fingerprint

_ARCHIVES = "http://snap.stanford.edu/ogb/data/nodeproppred"
_SPLITS = {"train": TRAIN, "valid": VAL, "test": TEST}
_CSV_BLOCK = 1 << 23  # bytes of text per chunk
_CHUNK = 1 << 20  # edges per chunk, or feature values
# Of an .npz file. A piece is reached by unpacking all that lies before it, so they are large, and few.
PIECE_EDGES = 1 << 28
PIECE_VALUES = 1 << 31
# Of storage, gzip and Arrow, zipfile, numpy's header.
_TROUBLE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class _Dataset:
    folder: str
    archive: str  # its name without .zip, and that of the folder in it
    num_classes: int
    split: str
    files: tuple[str, ...]


_CSV = ("edge.csv.gz", "node-feat.csv.gz", "node-label.csv.gz", "num-node-list.csv.gz", "num-edge-list.csv.gz")
_NPZ = ("data.npz", "node-label.npz")
_DATASETS = {
    "ogbn-arxiv": _Dataset("ogbn_arxiv", "arxiv", 40, "time", _CSV),
    "ogbn-products": _Dataset("ogbn_products", "products", 47, "sales_ranking", _CSV),
    "ogbn-papers100M": _Dataset("ogbn_papers100M", "papers100M-bin", 172, "time", _NPZ),
}
_REFUSED = {
    "ogbn-proteins": "its nodes have 112 labels each and no features; one label and some features are needed",
    "ogbn-mag": "its nodes and edges are of several types, and all but the papers have no features",
}


def ogb_folder(config: OgbConfig) -> str:
    """Where a dataset's files are. Raises `InputError` for one that is not supported."""
    if config.name not in _DATASETS:
        reason = _REFUSED.get(config.name, "unknown")
        raise InputError(f"source.name: {config.name}: {reason}. It is one of {', '.join(_DATASETS)}")
    return storage.join(config.root, _DATASETS[config.name].folder)


def open_ogb(config: OgbConfig) -> StreamedSource:
    """Open a dataset; where its files are missing, they are fetched by the package `ogb` if that is installed.

    Nodes without a label (NaN) get -1. Raises `InputError` naming the file for anything missing or malformed, here or
    when a piece is read.
    """
    url, dataset = ogb_folder(config), _DATASETS[config.name]
    files = ogb_files(config)
    read = _open_npz if dataset.files == _NPZ else _open_csv
    source = read(storage.join(url, "raw"), config, partial(_nodes, url, dataset))
    notes = {"nodes": f"{config.name}, below {url}", "label": dataset.files[1 if dataset.files == _NPZ else 2]}
    notes |= {"split": f"split/{dataset.split}", "edges": dataset.files[0]}
    return replace(source, about=About(notes=notes), fingerprint=fingerprint(config, files))


def ogb_files(config: OgbConfig) -> list[tuple[str, int, str]]:
    """The stamps of a dataset's files; where they are missing they are fetched, or refused, as by `open_ogb`."""
    url, dataset = ogb_folder(config), _DATASETS[config.name]
    splits = [f"split/{dataset.split}/{name}.csv.gz" for name in _SPLITS]
    names = [*(f"raw/{name}" for name in dataset.files), *splits]
    _ensure(url, config, names)
    return [storage.stamp(storage.join(url, name)) for name in names]


def _nodes(url: str, dataset: _Dataset, num_nodes: int, read_label: Callable[[], np.ndarray]) -> Nodes:
    what = storage.join(url, "raw", dataset.files[1 if dataset.files == _NPZ else 2])
    label_N = whole_labels(read_label(), what)
    if len(label_N) != num_nodes:
        raise InputError(f"{what}: {len(label_N):,} labels for {num_nodes:,} nodes")
    count_classes(label_N, what, dataset.num_classes)
    split_N = np.full(num_nodes, NO_SPLIT, np.int8)
    for name, code in _SPLITS.items():
        part = storage.join(url, "split", dataset.split, f"{name}.csv.gz")
        ids = np.concatenate([rows[:, 0] for rows in _csv(part, 1, pa.int64())])
        for wrong, trouble in (
            (lambda ids: (ids < 0) | (ids >= num_nodes), f"is out of range (0 to {num_nodes - 1})"),
            (lambda ids: split_N[ids] != NO_SPLIT, "is in two splits"),
            (lambda ids: label_N[ids] < 0, "has no label"),
        ):
            if np.any(found := wrong(ids)):
                raise InputError(f"{part}: node {ids[np.argmax(found)]} {trouble}")
        split_N[ids] = code
    return Nodes(label_N, split_N, np.arange(num_nodes))


# ------------------------------------------------------------------------------------------------- gzipped CSV
def _open_csv(raw: str, config: OgbConfig, nodes: Callable[..., Nodes]) -> StreamedSource:
    edge, feat, label, *counts = (storage.join(raw, name) for name in _CSV)
    num_nodes, num_edges = (_count(url) for url in counts)
    width = _columns(feat)
    return StreamedSource(
        name=config.name,
        num_nodes=num_nodes,
        num_features=width,
        num_classes=_DATASETS[config.name].num_classes,
        nodes=partial(nodes, num_nodes, partial(_csv_labels, label)),
        num_edges=num_edges,
        num_edge_pieces=1,  # as gzip is read from its start
        edges=partial(_csv_edges, edge, num_edges),
        feat_offsets=np.array([0, num_nodes]),
        feat=partial(_csv_feat, feat, num_nodes, width),
        undirected=config.undirected,
    )


def _csv_edges(url: str, num_edges: int, piece: int) -> Iterator[Edges]:
    for rows in _counted(url, _csv(url, 2, pa.int64()), num_edges):
        yield rows[:, 0], rows[:, 1]


def _csv_feat(url: str, num_nodes: int, width: int, piece: int) -> Iterator[np.ndarray]:
    return _counted(url, _csv(url, width, pa.float32()), num_nodes)


def _csv_labels(url: str) -> np.ndarray:
    return np.concatenate([rows[:, 0] for rows in _csv(url, 1, pa.float64())])


def _count(url: str) -> int:
    rows = np.concatenate(list(_csv(url, 1, pa.int64())))
    if rows.shape != (1, 1):
        raise InputError(f"{url}: the count of one graph expected, found those of {len(rows)}")
    return int(rows[0, 0])


def _counted(url: str, chunks: Iterator[np.ndarray], expected: int) -> Iterator[np.ndarray]:
    """The chunks, as long as they have no more rows than expected, and in all no fewer."""
    found = 0
    for rows in chunks:
        found += len(rows)
        if found > expected:
            break
        yield rows
    if found != expected:
        more = " or more" if found > expected else ""
        raise InputError(f"{url}: {found:,} rows{more}, {expected:,} expected; the file was changed or cut off")


def _columns(url: str) -> int:
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as raw, gzip.open(raw) as stream:
            return stream.readline().count(b",") + 1
    except _TROUBLE as error:
        raise InputError(f"{url}: not a whole gzipped CSV file: {error}") from None


def _csv(url: str, columns: int, kind: Any) -> Iterator[np.ndarray]:
    """The rows of a gzipped CSV file without a header, in chunks `[n, columns]`."""
    names = [str(column) for column in range(columns)]
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as raw, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "gzip") as stream:
            reader = csv.open_csv(
                stream,
                read_options=csv.ReadOptions(column_names=names, block_size=_CSV_BLOCK),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, kind)),
            )
            for batch in reader:
                if pa.types.is_integer(kind) and any(column.null_count for column in batch.columns):
                    raise ValueError("a number is missing")
                yield np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch.columns])
    except _TROUBLE as error:
        raise InputError(f"{url}: not a whole gzipped CSV file of {columns} column(s) of numbers: {error}") from None


# -------------------------------------------------------------------------------------------------------- .npz
def _open_npz(raw: str, config: OgbConfig, nodes: Callable[..., Nodes]) -> StreamedSource:
    data, label = (storage.join(raw, name) for name in _NPZ)
    with _member(data, "node_feat") as feat, _member(data, "edge_index") as edge:
        if len(feat.shape) != 2 or feat.fortran or feat.dtype.kind != "f":
            raise InputError(f"{data}: node_feat: rows of floats expected, found {feat}")
        if len(edge.shape) != 2 or edge.shape[0] != 2 or edge.dtype.kind not in "iu":
            raise InputError(f"{data}: edge_index: two rows of integers expected, found {edge}")
        num_nodes, width = feat.shape
        num_edges = edge.shape[1]
    rows = max(1, PIECE_VALUES // width)
    return StreamedSource(
        name=config.name,
        num_nodes=num_nodes,
        num_features=width,
        num_classes=_DATASETS[config.name].num_classes,
        nodes=partial(nodes, num_nodes, partial(_npz_labels, label)),
        num_edges=num_edges,
        num_edge_pieces=-(-num_edges // PIECE_EDGES),
        edges=partial(_npz_edges, data),
        feat_offsets=np.array([*range(0, num_nodes, rows), num_nodes]),
        feat=partial(_npz_feat, data, rows),
        undirected=config.undirected,
    )


def _npz_edges(url: str, piece: int) -> Iterator[Edges]:
    # Rows of sources and of destinations lie one after the other, or pairs do: then the array is called Fortran's.
    with _member(url, "edge_index") as src, _member(url, "edge_index") as dst:
        num_edges = src.shape[1]
        first = piece * PIECE_EDGES
        stop = min(first + PIECE_EDGES, num_edges)
        src.skip(2 * first if src.fortran else first)
        if not src.fortran:
            dst.skip(num_edges + first)
        for start in range(first, stop, _CHUNK):
            count = min(_CHUNK, stop - start)
            if src.fortran:
                pairs = src.read(2 * count).reshape(count, 2)
                yield pairs[:, 0], pairs[:, 1]
            else:
                yield src.read(count), dst.read(count)
        if stop == num_edges:
            (src if src.fortran else dst).finish()


def _npz_feat(url: str, rows: int, piece: int) -> Iterator[np.ndarray]:
    with _member(url, "node_feat") as feat:
        num_nodes, width = feat.shape
        first, stop = piece * rows, min((piece + 1) * rows, num_nodes)
        feat.skip(first * width)
        at_once = max(1, _CHUNK // width)
        for start in range(first, stop, at_once):
            count = min(at_once, stop - start)
            yield feat.read(count * width).reshape(count, width)
        if stop == num_nodes:
            feat.finish()


def _npz_labels(url: str) -> np.ndarray:
    with _member(url, "node_label") as label:
        if label.dtype.kind not in "fiu":
            raise InputError(f"{url}: node_label: numbers expected, found {label}")
        values = label.read(int(np.prod(label.shape)))
        label.finish()
    return values.astype(np.float32 if values.itemsize <= 4 else np.float64, copy=False)


@dataclass(frozen=True)
class _Member:
    """An array in an `.npz` file as a stream of its values."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}" + (" in Fortran's order" if self.fortran else "")

    def skip(self, values: int) -> None:
        self.stream.seek(values * self.dtype.itemsize, os.SEEK_CUR)

    def read(self, values: int) -> np.ndarray:
        content = self.stream.read(values * self.dtype.itemsize)
        if len(content) < values * self.dtype.itemsize:
            raise EOFError("the array was cut off")
        return np.frombuffer(content, self.dtype)

    def finish(self) -> None:
        """At the end, the checksum of the whole member is compared."""
        if self.stream.read(1):
            raise ValueError("more values than its shape says")


@contextmanager
def _member(url: str, name: str) -> Iterator[_Member]:
    fs, path = storage.filesystem(url)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with fs.open(path, "rb") as raw, zipfile.ZipFile(raw) as archive, archive.open(f"{name}.npy") as stream:
            shape, fortran, dtype = read_header[np.lib.format.read_magic(stream)](stream)
            if dtype.hasobject:
                raise ValueError("Python objects are not read")
            yield _Member(stream, shape, fortran, dtype)
    except _TROUBLE as error:
        raise InputError(f"{url}: {name}: not a whole, plain array: {error}") from None


# --------------------------------------------------------------------------------------------------- the files
def _ensure(url: str, config: OgbConfig, names: list[str]) -> None:
    """Raise `InputError` unless all files are there or can be fetched."""
    missing = [name for name in names if not storage.exists(storage.join(url, name))]
    if not missing:
        return
    archive = f"{_ARCHIVES}/{_DATASETS[config.name].archive}.zip"
    trouble = f"{url}: {', '.join(missing)} missing"
    by_hand = f"Unpack {archive} so that its folder `{_DATASETS[config.name].archive}` becomes {url}"
    if storage.exists(url) or not storage.is_local(url):
        raise InputError(f"{trouble}. {by_hand}")
    try:
        fetch = import_module("ogb.utils.url")
    except ImportError:
        raise InputError(f"{trouble}. {by_hand}, or pip install 'rbm-dist[ogb]' to have it fetched") from None
    target = storage.absolute(url)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(target), prefix=storage.TEMPORARY) as folder:
            fetch.extract_zip(fetch.download_url(archive, folder), folder)
            os.rename(os.path.join(folder, _DATASETS[config.name].archive), target)  # refused where there is something
    except Exception as error:  # of many kinds: urllib's, zipfile's, ogb's own
        raise InputError(f"{trouble}, and {archive} cannot be fetched: {error}. {by_hand}") from None
