"""A small random graph on disk, with soft labels, for tests that need a whole store."""

import itertools
from dataclasses import replace

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.graph import csc, shuffle
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.graph.shuffle import Layout, Numbering
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources.source import SourceGraph
from rbm_dist.sources.staged import StagedSource, write_source


def small_graph(num_nodes: int = 240, num_features: int = 12, num_classes: int = 5, seed: int = 0) -> SourceGraph:
    """Communities of one class each, with features that lean towards their class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, num_nodes)
    src = rng.integers(0, num_nodes, 6 * num_nodes)
    same = np.array([rng.choice(np.flatnonzero(label == label[node])) for node in src])
    dst = np.where(rng.random(len(src)) < 0.8, same, rng.integers(0, num_nodes, len(src)))
    feat = rng.normal(size=(num_nodes, num_features)).astype(np.float32)
    feat[np.arange(num_nodes), label] += 1.5
    return SourceGraph(
        csc=csc.build(src, dst, num_nodes, undirected=True),
        num_features=num_features,
        num_classes=num_classes,
        label=label,
        split=rng.choice(np.array([0, 1, 2], np.int8), num_nodes, p=[0.3, 0.3, 0.4]),
        feat_chunks=lambda: iter([feat]),
        read_edges=0,
        dropped_self_loops=0,
        dropped_duplicates=0,
    )


def with_sparse_features(graph: SourceGraph, num_features: int = 40, density: float = 0.1) -> SourceGraph:
    """The same graph with features of mostly zeros, in two chunks; some nodes have none but zeros."""
    rng = np.random.default_rng(3)
    feat = rng.normal(size=(graph.csc.num_nodes, num_features))
    feat *= rng.random(feat.shape) < density
    rows, half = sp.csr_array(feat.astype(np.float32)), graph.csc.num_nodes // 2
    return replace(
        graph, num_features=num_features, feat_chunks=lambda: iter([rows[:half], rows[half:]]), sparse_feat=True
    )


def write_graph(url: str, graph: SourceGraph, part_N: np.ndarray, features: str = "float32") -> GraphStore:
    """Write a graph's shards for a given assignment of nodes to parts."""
    source = StagedSource.open(f"{url}/source", write_source(f"{url}/source", graph))
    write_shards(f"{url}/graph", source, part_N, int(part_N.max()) + 1, graph.num_classes, features)
    return GraphStore.open(f"{url}/graph")


def write_shards(
    url: str, source: StagedSource, part_N: np.ndarray, num_parts: int, num_classes: int, features: str = "float32"
) -> None:
    """Write a staged source as a graph of parts, in this process."""
    numbering, spill_url = Numbering.of(part_N, num_parts), storage.join(url, shuffle.SPILL)
    csc = source.edges(slice(0, source.num_nodes))
    spills = [
        shuffle.spill_chunk(spill_url, chunk, int(first), int(stop), source, numbering)
        for chunk, (first, stop) in enumerate(itertools.pairwise(shuffle.chunk_bounds(csc.indptr)))
    ]
    layout = Layout.of(source, features, np.max([spill.feat_max for spill in spills], axis=0))
    files: dict[str, storage.FileInfo] = {}
    for part in range(num_parts):
        files |= shuffle.write_part(url, part, spill_url, shuffle.plan_part(spills, part), layout)
    report = partition_report(csc, part_N, num_parts)
    shuffle.write_index(url, numbering.offsets.tolist(), source, {"num_classes": num_classes}, files, report, layout)
    storage.remove(spill_url)


def small_store(url: str, num_parts: int = 4) -> GraphStore:
    """The small graph in uneven parts, with what the stage `soft_labels` adds: `soft` is a noisy view of the labels."""
    graph = small_graph()
    rng = np.random.default_rng(1)
    store = write_graph(url, graph, rng.choice(num_parts, graph.csc.num_nodes, p=_uneven(num_parts)).astype(np.int32))
    files: dict[str, list[storage.FileInfo]] = {"soft": [], "entropy_change": [], "hidden": []}
    for part in range(num_parts):
        label = store.array("label", part)
        logits = rng.normal(size=(len(label), graph.num_classes))
        logits[np.arange(len(label)), label] += 2
        soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        arrays = {"soft": soft, "entropy_change": rng.random(len(label)) ** 2, "hidden": rng.random((len(label), 7))}
        for name, array in arrays.items():
            files[name].append(store.write_part(name, part, np.dtype(np.float32), array.shape[1:], [array]))
    for name, infos in files.items():
        store.publish(name, infos)
    assert storage.exists(f"{url}/graph/soft.json")
    return store


def _uneven(num_parts: int) -> np.ndarray:
    shares = np.arange(1, num_parts + 1, dtype=float)
    return shares / shares.sum()
