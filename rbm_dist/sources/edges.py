"""Edge lists of any length to the CSC of their in-edges, in bounded memory: an external merge sort.

An edge is one 64-bit word, its destination above its source above a bit that says whether it was given or is the
reverse of one that was. Chunks of edges are sorted into runs on disk; ranges of nodes are then merged from all runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc, id_dtype
from rbm_dist.sources.streamed import Edges

MAX_NODES = 1 << 31
"""Nodes that a packed edge has room for."""
RUN_EDGES = 1 << 22
"""Edges that are sorted at once."""
MERGED_EDGES = 1 << 24
"""Edges that are merged at once, but for a single node of more."""
_RANGES = 4096  # of nodes: the grain in which merges are cut
_REVERSE = np.int64(1)


@dataclass(frozen=True)
class Run:
    """One sorted run: its file, what it was made from, and how many of its words lie below each range's end."""

    name: str  # below the folder of the runs, which may be moved
    info: storage.FileInfo
    given: int  # edges, before self-loops and duplicates were dropped
    self_loops: int
    hidden: int  # given edges from unseen nodes to others
    ends: list[int]


def write_runs(
    url: str, edges: Iterable[Edges], num_nodes: int, undirected: bool, unseen_N: np.ndarray | None
) -> list[Run]:
    """Sort chunks of (sources, destinations) into runs `<url>-00000.npy` …, with every edge's reverse if `undirected`.

    unseen_N: `[N]` bool, or None if there are none; edges from these nodes to others are left out. Raises
    `InputError` for an id out of range.
    """
    if num_nodes > MAX_NODES:
        raise InputError(f"{url}: {num_nodes:,} nodes; at most {MAX_NODES:,} are supported")
    runs: list[Run] = []
    for src_M, dst_M in _pieces(edges):
        for ids in (src_M, dst_M):
            if ids.min() < 0 or ids.max() >= num_nodes:
                outside = np.flatnonzero((ids < 0) | (ids >= num_nodes))
                raise InputError(
                    f"edges: {len(outside):,} node ids are out of range, first {ids[outside[0]]} "
                    f"(valid: 0 to {num_nodes - 1})"
                )
        loops = int(np.sum(src_M == dst_M))
        keep = src_M != dst_M
        words = _pack(src_M[keep], dst_M[keep], num_nodes, unseen_N, np.int64(0))
        hidden = len(src_M) - loops - len(words)
        if undirected:
            words = np.concatenate([words, _pack(dst_M[keep], src_M[keep], num_nodes, unseen_N, _REVERSE)])
        words.sort()
        words = words[_is_first(words)]
        run_url = f"{url}-{len(runs):05d}.npy"
        info = storage.write_array(run_url, words)
        ends = np.searchsorted(words, _first_words(range_bounds(num_nodes)[1:], num_nodes))
        runs.append(Run(run_url.rsplit("/", 1)[-1], info, len(src_M), loops, hidden, ends.tolist()))
    return runs


def range_bounds(num_nodes: int) -> np.ndarray:
    """The fixed ranges of nodes in which runs are counted: their bounds, ascending."""
    return np.linspace(0, num_nodes, min(_RANGES, num_nodes) + 1).astype(np.int64)


@dataclass(frozen=True)
class Merge:
    """What one merge takes: the nodes `low` to `high`, and of each run the words `(name, info, first, stop)`."""

    low: int
    high: int
    slices: list[tuple[str, storage.FileInfo, int, int]]


def plan_merges(runs: list[Run], num_nodes: int) -> list[Merge]:
    """Ranges of nodes, ascending, of at most `MERGED_EDGES` words each where that can be."""
    bounds = range_bounds(num_nodes)
    below_RunRange = np.zeros((len(runs), len(bounds)), np.int64)
    for run, below in zip(runs, below_RunRange, strict=True):
        below[1:] = run.ends
    total = below_RunRange.sum(axis=0)
    merges, first = [], 0
    while first < len(bounds) - 1:
        fits = int(np.searchsorted(total, total[first] + MERGED_EDGES, side="right")) - 1
        stop = min(max(fits, first + 1), len(bounds) - 1)
        slices = [
            (run.name, run.info, int(below[first]), int(below[stop]))
            for run, below in zip(runs, below_RunRange, strict=True)
            if below[first] < below[stop]
        ]
        merges.append(Merge(int(bounds[first]), int(bounds[stop]), slices))
        first = stop
    return merges


def merge(url: str, wanted: Merge, num_nodes: int) -> tuple[Csc, int]:
    """The CSC of a range of nodes, and how many distinct edges of it were given rather than reversed.

    url: the folder of the runs. Sources ascend per node; there are neither self-loops nor duplicates.
    """
    slices = [storage.open_rows(storage.join(url, name), info)[first:stop] for name, info, first, stop in wanted.slices]
    words = np.concatenate(slices) if slices else np.empty(0, np.int64)
    words.sort()
    given = int(np.sum((words & _REVERSE == 0) & _is_first(words)))
    words >>= 1
    words = words[_is_first(words)]
    shift = _shift(num_nodes) - 1
    indptr = np.searchsorted(words, np.arange(wanted.low, wanted.high + 1, dtype=np.int64) << shift)
    words &= (1 << shift) - 1
    return Csc(indptr.astype(np.int64), words.astype(id_dtype(num_nodes))), given


def _pieces(edges: Iterable[Edges]) -> Iterator[Edges]:
    """Chunks of edges, gathered or cut so that each but the last has `RUN_EDGES`."""
    held: list[Edges] = []
    count = 0
    for src_M, dst_M in edges:
        start = 0
        while start < len(src_M):
            take = min(RUN_EDGES - count, len(src_M) - start)
            held.append((src_M[start : start + take], dst_M[start : start + take]))
            count, start = count + take, start + take
            if count == RUN_EDGES:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[Edges]) -> Edges:
    src, dst = zip(*held, strict=True)
    return np.concatenate(src).astype(np.int64), np.concatenate(dst).astype(np.int64)


def _shift(num_nodes: int) -> int:
    return max(1, (num_nodes - 1).bit_length()) + 1


def _pack(
    src_M: np.ndarray, dst_M: np.ndarray, num_nodes: int, unseen_N: np.ndarray | None, reverse: np.int64
) -> np.ndarray:
    if unseen_N is not None:
        keep = unseen_N[dst_M] | ~unseen_N[src_M]
        src_M, dst_M = src_M[keep], dst_M[keep]
    return (dst_M << _shift(num_nodes)) | (src_M << 1) | reverse


def _is_first(words: np.ndarray) -> np.ndarray:
    """Which of these ascending words differ from the one before."""
    first = np.ones(len(words), bool)
    np.not_equal(words[1:], words[:-1], out=first[1:])
    return first


def _first_words(nodes: np.ndarray, num_nodes: int) -> np.ndarray:
    """The lowest word that an edge into each of these nodes can have."""
    words = nodes << _shift(num_nodes)
    # Past the last node of 2^31 lies 2^63: as a signed word it would be negative.
    return np.where(words < 0, np.iinfo(np.int64).max, words)
