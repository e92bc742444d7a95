"""A synthetic graph of any size that is never stored: planted communities, power-law degrees, features and labels.

Every node and edge is a closed form of the seed and its number, so any piece is made alone, in the memory of a chunk.
A node has a rank; communities are ranges of ranks, and a keyed permutation scatters the ranks over the ids.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
from numba import njit

from rbm_dist.config.source import SyntheticConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import id_dtype
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.randomness.bits import generator, key, mix
from rbm_dist.randomness.words import Word
from rbm_dist.sources.streamed import Edges, Nodes, StreamedSource

PIECE_EDGES = 1 << 20
PIECE_ROWS = 1 << 17
_CHUNK_ROWS = 1 << 13
_ROUNDS = 3  # of the permutation
_UNIT = 2.0**-53
_U = np.uint64


def open_synthetic(config: SyntheticConfig, seed: int) -> StreamedSource:
    """The graph of a configuration and a seed: `round(N · degree / 2)` undirected edges, drawn with replacement.

    An edge's first end is in a community in proportion to its size, its second in the same one with probability
    `homophily`. Within a community of n nodes the node at position p ≥ 0 is drawn in proportion to
    `(p + 2)^(1 - a) - (p + 1)^(1 - a)` ~ `p^-a`, a = 1 / (power - 1): degrees that follow a power law with that
    exponent. What coincides is for the reader to drop: a few per cent, the more the smaller and denser the communities.
    Raises `InputError` if a community would have no more nodes than a node has neighbours.
    """
    sizes = np.diff(_offsets(config))
    if sizes.min() <= config.degree:
        raise InputError(
            f"source.num_communities: the smallest of {config.num_communities:,} communities has {sizes.min():,} of "
            f"{config.num_nodes:,} nodes, for a mean degree of {config.degree:g}; raise num_nodes or lower one of these"
        )
    pieces = range(0, config.num_nodes, PIECE_ROWS)
    return StreamedSource(
        name="synthetic",
        num_nodes=config.num_nodes,
        num_features=config.num_features,
        num_classes=config.num_classes,
        nodes=partial(_nodes, config, seed),
        num_edges=_num_edges(config),
        num_edge_pieces=-(-_num_edges(config) // PIECE_EDGES),
        edges=partial(_edges, config, seed),
        feat_offsets=np.array([*pieces, config.num_nodes], np.int64),
        feat=partial(_feat, config, seed),
        undirected=True,
    )


def communities(config: SyntheticConfig, seed: int, ids_B: np.ndarray) -> np.ndarray:
    """The community of each of these nodes, `[B]` int64; community c is of class `c mod num_classes`."""
    rank_B = ids_B.astype(_U)
    _unpermute(rank_B, *_permutation(config, seed))
    return np.searchsorted(_offsets(config), rank_B.astype(np.int64), side="right") - 1


def _num_edges(config: SyntheticConfig) -> int:
    return round(config.num_nodes * config.degree / 2)


def _offsets(config: SyntheticConfig) -> np.ndarray:
    """The first rank of each community and the end, `[K + 1]` int64: sizes fall as `sqrt(c + 1) - sqrt(c)`."""
    share = np.arange(config.num_communities + 1) / config.num_communities
    return (config.num_nodes * np.sqrt(share)).astype(np.int64)


def _nodes(config: SyntheticConfig, seed: int) -> Nodes:
    """17 bytes per node."""
    label = np.empty(config.num_nodes, np.int64)
    split = np.empty(config.num_nodes, np.int8)
    bounds = np.cumsum([config.train_share, config.val_share, config.test_share])
    bounds[-1] = 1.0 if math.isclose(bounds[-1], 1) else bounds[-1]
    codes = np.array([TRAIN, VAL, TEST, NO_SPLIT], np.int8)
    for start in range(0, config.num_nodes, PIECE_ROWS):
        ids = np.arange(start, min(start + PIECE_ROWS, config.num_nodes))
        split_draw, noise_draw = generator(seed, Word.SYNTHETIC_NODES, start).random((2, len(ids)))
        cls = communities(config, seed, ids) % config.num_classes
        noisy = noise_draw < config.label_noise  # and how far below says which other class it is
        cls[noisy] += 1 + (noise_draw[noisy] / config.label_noise * (config.num_classes - 1)).astype(np.int64)
        cls %= config.num_classes
        split[ids] = codes[np.searchsorted(bounds, split_draw, side="right")]
        label[ids] = np.where(split[ids] == NO_SPLIT, -1, cls)
    return Nodes(label, split, np.arange(config.num_nodes))


def _feat(config: SyntheticConfig, seed: int, piece: int) -> Iterator[np.ndarray]:
    """`[n, F]` float32: the community's centre and noise. Half of a centre's squared norm is its class's."""
    rng = generator(seed, Word.SYNTHETIC_CENTRES)
    of_class = rng.standard_normal((config.num_classes, config.num_features), np.float32)
    of_community = rng.standard_normal((config.num_communities, config.num_features), np.float32)
    centre_KF = of_class[np.arange(config.num_communities) % config.num_classes] + of_community
    centre_KF /= np.linalg.norm(centre_KF, axis=1, keepdims=True)
    end = min((piece + 1) * PIECE_ROWS, config.num_nodes)
    for start in range(piece * PIECE_ROWS, end, _CHUNK_ROWS):
        ids = np.arange(start, min(start + _CHUNK_ROWS, end))
        rows_BF = generator(seed, Word.SYNTHETIC_NOISE, start).standard_normal(
            (len(ids), config.num_features), np.float32
        )
        rows_BF *= np.float32(config.noise)
        rows_BF += centre_KF[communities(config, seed, ids)]
        yield rows_BF


def _edges(config: SyntheticConfig, seed: int, piece: int) -> Iterator[Edges]:
    first = piece * PIECE_EDGES
    count = min(PIECE_EDGES, _num_edges(config) - first)
    src_M, dst_M = np.empty((2, count), _U)
    offsets = _offsets(config)
    exponent = (config.power - 2) / (config.power - 1)  # 1 - a
    span_K = (np.diff(offsets) + 1.0) ** exponent - 1
    _draw_ends(
        src_M, dst_M, _U(key(seed, Word.SYNTHETIC_EDGES)), first, offsets, span_K, 1 / exponent, config.homophily
    )
    permutation = _permutation(config, seed)
    dtype = id_dtype(config.num_nodes)
    for ranks_M in (src_M, dst_M):
        _permute(ranks_M, *permutation)
    yield src_M.astype(dtype), dst_M.astype(dtype)


@njit(cache=True, nogil=True)
def _draw_ends(src_M, dst_M, edges_key, first, offsets, span_K, power, homophily):  # type: ignore[no-untyped-def]
    """The ranks of both ends of the edges from number `first` on; four draws each, keyed by the number."""
    num_nodes = offsets[-1]
    for m in range(len(src_M)):
        state = mix(edges_key, _U(first + m))
        at = _uniform(state, 0) * num_nodes
        c = _community(at, offsets)
        low, size = offsets[c], offsets[c + 1] - offsets[c]
        src_M[m] = _rank(at, c, offsets, span_K, power)
        other = _uniform(state, 1)
        if _uniform(state, 2) < homophily:
            at = low + other * size
        else:  # anywhere but there
            at = low + size + other * (num_nodes - size)
            if at >= num_nodes:
                at -= num_nodes
            c = _community(at, offsets)
        dst_M[m] = _rank(at, c, offsets, span_K, power)


@njit(inline="always")
def _uniform(state, draw):  # type: ignore[no-untyped-def]
    return np.float64(mix(state, _U(draw)) >> _U(11)) * _UNIT


@njit(inline="always")
def _community(at, offsets):  # type: ignore[no-untyped-def]
    """The community whose range of ranks the point `at` falls into."""
    num_communities = len(offsets) - 1
    share = at / offsets[-1]
    c = min(int(num_communities * share * share), num_communities - 1)  # the inverse of `_offsets`, but for rounding
    while at < offsets[c]:
        c -= 1
    while at >= offsets[c + 1] and c < num_communities - 1:
        c += 1
    return c


@njit(inline="always")
def _rank(at, c, offsets, span_K, power):  # type: ignore[no-untyped-def]
    """Where `at` lies in its community, as a share, says which position of the power law is drawn."""
    low, size = offsets[c], offsets[c + 1] - offsets[c]
    position = int((1 + (at - low) / size * span_K[c]) ** power - 1)
    return _U(low + min(max(position, 0), size - 1))


def _permutation(config: SyntheticConfig, seed: int) -> tuple[np.uint64, np.uint64, np.ndarray]:
    """A keyed permutation of `[0, N)`: N, its bits b, and `[_ROUNDS, 3]` multipliers, their inverses, and addends.

    A round multiplies, adds and shifts words of b bits; all rounds are repeated while the result is N or more. Each
    step can be undone: multipliers are odd, and `x ^ (x >> s)` with `2 s ≥ b` is its own inverse.
    """
    bits = max(2, (config.num_nodes - 1).bit_length())
    rounds = []
    for i in range(_ROUNDS):
        multiplier = key(seed, Word.SYNTHETIC_PERMUTATION, i, 0) % (1 << bits) | 1
        rounds.append(
            (multiplier, pow(multiplier, -1, 1 << bits), key(seed, Word.SYNTHETIC_PERMUTATION, i, 1) % (1 << bits))
        )
    return _U(config.num_nodes), _U(bits), np.array(rounds, _U)


@njit(cache=True, nogil=True)
def _permute(ids, num_nodes, bits, rounds):  # type: ignore[no-untyped-def]
    """In place, ranks to ids."""
    mask, shift = (_U(1) << bits) - _U(1), (bits + _U(1)) >> _U(1)
    for m in range(len(ids)):
        x = ids[m]
        while True:
            for i in range(_ROUNDS):
                x = (x * rounds[i, 0] + rounds[i, 2]) & mask
                x ^= x >> shift
            if x < num_nodes:
                break
        ids[m] = x


@njit(cache=True, nogil=True)
def _unpermute(ids, num_nodes, bits, rounds):  # type: ignore[no-untyped-def]
    """In place, ids to ranks."""
    mask, shift = (_U(1) << bits) - _U(1), (bits + _U(1)) >> _U(1)
    for m in range(len(ids)):
        x = ids[m]
        while True:
            for i in range(_ROUNDS - 1, -1, -1):
                x ^= x >> shift
                x = ((x - rounds[i, 2]) * rounds[i, 1]) & mask
            if x < num_nodes:
                break
        ids[m] = x
