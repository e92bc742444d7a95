"""Neighbour sampling without replacement: CSC + seeds + fan-out → sampled edges, relabelled.

Per hop three passes, so that cache misses overlap: choose edges (Floyd's algorithm), look their sources up, relabel.
A draw depends on (key, hop, node) alone, never on the order of the seeds, on threads or on how the graph is cut.
Other kernels (pyg-lib, torch-sparse) stand behind the same `Sampler` in `sampler_backends.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numba import njit

from rbm_dist.graph.csc import Csc
from rbm_dist.randomness.bits import mix


@dataclass(frozen=True)
class Sample:
    """A sampled neighbourhood of n nodes and m edges; nodes and edges stand in order of the hop that found them."""

    nodes: np.ndarray  # [n] int64 ids, the seeds first
    src: np.ndarray  # [m] int64 position in `nodes` of each edge's source
    dst: np.ndarray  # [m] int64 position in `nodes` of each edge's destination, ascending
    nodes_per_hop: list[int]  # hops + 1 entries, the first is the number of seeds
    edges_per_hop: list[int]  # hops entries


class Sampler(Protocol):
    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> Sample:
        """Sample up to `fanout[h]` in-edges (-1: all) of each node first met at hop h.

        seeds: `[s]` distinct ids. key: 64 random bits that decide every draw.
        Raises `ValueError` if a seed is repeated or out of range.
        """
        ...


class RemoteEdges(Protocol):
    """The edges of parts that other hosts hold."""

    def in_edges(self, ids: np.ndarray, width: int, key: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Ask for what `NumbaSampler.in_edges` draws there, at once; the answers come piece by piece.

        A piece: positions in `ids`, ascending; how many edges each of these nodes has; all their sources.
        """
        ...


class NumbaSampler:
    """The built-in kernel, over a graph cut into parts. Not thread-safe (`in_edges` is): each thread needs its own.

    parts: those held here, by number. Edges of all others are drawn by `remote`.
    """

    def __init__(
        self, parts: Mapping[int, Csc], offsets: np.ndarray, remote: RemoteEdges | None = None
    ):  # fmt: skip
        self._parts = parts
        self._offsets = offsets
        self._remote = remote
        # Position of each node in the sample at hand, plus one; 0 where it is absent. Reset after each call.
        self._position = np.zeros(int(offsets[-1]), np.int32)

    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> Sample:
        seeds = np.ascontiguousarray(seeds, np.int64)
        if len(seeds) and (seeds.min() < 0 or seeds.max() >= len(self._position)):
            raise ValueError(f"seeds must lie in [0, {len(self._position)})")
        nodes_per_hop, edges_per_hop = [len(seeds)], []
        found, all_src, all_dst = [seeds], [], []
        if not _mark(self._position, seeds, 0):
            _unmark(self._position, seeds)
            raise ValueError("seeds must be distinct")
        frontier, first, total = seeds, 0, len(seeds)
        try:
            for hop, width in enumerate(fanout):
                counts, sources = self.in_edges(frontier, width, int(mix(np.uint64(key), np.uint64(hop))))
                src, new = _relabel(self._position, sources, total)
                all_src.append(src)
                all_dst.append(np.repeat(np.arange(first, first + len(frontier)), counts))
                found.append(new)
                nodes_per_hop.append(len(new))
                edges_per_hop.append(len(src))
                frontier, first, total = new, total, total + len(new)
        finally:
            for ids in found:
                _unmark(self._position, ids)
        return Sample(np.concatenate(found), _concatenate(all_src), _concatenate(all_dst), nodes_per_hop, edges_per_hop)

    def in_edges(self, ids: np.ndarray, width: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `width` in-edges (-1: all) of some nodes: how many of each, and all their sources, both int64.

        key: 64 random bits that, with the node's id, decide its draws.
        """
        counts = np.empty(len(ids), np.int64)
        here, away = self._owned(ids)
        answers: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]] = iter(())
        if len(away):
            if self._remote is None:
                part = np.searchsorted(self._offsets, ids[away[0]], side="right") - 1
                raise ValueError(f"part {part} is not held here")
            answers = self._remote.in_edges(ids[away], width, key)
        picked = []
        for part, at in here:  # while the others are asked
            csc = self._parts[part]
            _count(csc.indptr, ids, at, self._offsets[part], width, counts)
            picked.append(_pick(csc.indptr, ids, at, self._offsets[part], counts, np.uint64(key)))
        pieces = []
        for at, count, found in answers:
            counts[away[at]] = count
            pieces.append((away[at], found))
        pieces += [
            (at, _look_up(self._parts[part].indices, edges)) for (part, at), edges in zip(here, picked, strict=True)
        ]
        if len(pieces) == 1 and here:  # in the order of `ids`
            return counts, pieces[0][1]
        ends = np.cumsum(counts)
        sources = np.empty(ends[-1] if len(ends) else 0, np.int64)
        for at, found in pieces:
            _place(found, at, counts, ends, sources)
        return counts, sources

    def _owned(self, ids: np.ndarray) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
        """(part, positions in `ids` that it owns) for the parts held here that own any; positions of all others."""
        if len(self._offsets) == 2 and self._parts:
            return [(0, np.arange(len(ids)))], np.empty(0, np.int64)
        owner = np.searchsorted(self._offsets, ids, side="right") - 1
        owned = [(int(part), np.flatnonzero(owner == part)) for part in np.unique(owner)]
        away = [at for part, at in owned if part not in self._parts]
        return (
            [(part, at) for part, at in owned if part in self._parts],
            np.sort(np.concatenate(away)) if away else np.empty(0, np.int64),
        )


@njit(cache=True, nogil=True)
def _count(indptr, ids, at, first_id, width, counts):  # type: ignore[no-untyped-def]
    for i in at:
        row = ids[i] - first_id
        degree = indptr[row + 1] - indptr[row]
        counts[i] = degree if width < 0 or degree < width else width


@njit(cache=True, nogil=True)
def _pick(indptr, ids, at, first_id, counts, key):  # type: ignore[no-untyped-def]
    total = 0
    for i in at:
        total += counts[i]
    edges = np.empty(total, np.int64)
    start = 0
    for i in at:
        row = ids[i] - first_id
        low = indptr[row]
        degree, take = indptr[row + 1] - low, counts[i]
        if take == degree:
            for j in range(take):
                edges[start + j] = low + j
        else:
            state = mix(key, np.uint64(ids[i]))
            # Floyd: the j-th draw is below degree - take + j + 1; a repeat takes that bound's top instead.
            for j in range(take):
                top = degree - take + j
                bits = mix(state, np.uint64(j))
                # A product of 32 random bits: the bias is below 2^-32 · top.
                drawn = low + np.int64(((bits >> np.uint64(32)) * np.uint64(top + 1)) >> np.uint64(32))
                for earlier in range(start, start + j):
                    if edges[earlier] == drawn:
                        drawn = low + top
                        break
                edges[start + j] = drawn
        start += take
    return edges


@njit(cache=True, nogil=True)
def _look_up(indices, edges):  # type: ignore[no-untyped-def]
    # A loop of reads alone, so that their cache misses overlap.
    sources = np.empty(len(edges), np.int64)
    for e in range(len(edges)):
        sources[e] = indices[edges[e]]
    return sources


@njit(cache=True, nogil=True)
def _place(found, at, counts, ends, sources):  # type: ignore[no-untyped-def]
    start = 0
    for i in at:
        begin = ends[i] - counts[i]
        for j in range(counts[i]):
            sources[begin + j] = found[start + j]
        start += counts[i]


@njit(cache=True, nogil=True)
def _mark(position, ids, first):  # type: ignore[no-untyped-def]
    distinct = True
    for i in range(len(ids)):
        if position[ids[i]] != 0:
            distinct = False
        position[ids[i]] = first + i + 1
    return distinct


@njit(cache=True, nogil=True)
def _unmark(position, ids):  # type: ignore[no-untyped-def]
    for i in range(len(ids)):
        position[ids[i]] = 0


@njit(cache=True, nogil=True)
def _relabel(position, sources, total):  # type: ignore[no-untyped-def]
    src = np.empty(len(sources), np.int64)
    new = np.empty(len(sources), np.int64)
    num_new = 0
    for i in range(len(sources)):
        node = sources[i]
        if position[node] == 0:
            new[num_new] = node
            num_new += 1
            position[node] = total + num_new
        src[i] = position[node] - 1
    return src, new[:num_new].copy()


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
