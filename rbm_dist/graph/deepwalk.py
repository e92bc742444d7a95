"""DeepWalk (Perozzi et al., 2014): word vectors of nodes, whose sentences are random walks. Holds a graph in memory."""

from collections.abc import Callable, Iterator

import numpy as np
from numba import njit

from rbm_dist.graph import csc as csc_
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.bits import generator, key, mix
from rbm_dist.randomness.words import Word

_WALKS, _LENGTH, _WINDOW, _EPOCHS = 10, 40, 5, 1


def deepwalk(store: GraphStore, dim: int, seed: int) -> Callable[[int], list[np.ndarray]]:
    """Embed the whole observed graph; gives a function from a part to its rows, `[n, dim]` float32 of unit length.

    A walk starts at an observed node and goes on to in-neighbours, which are observed too. Zeros for a node that no
    walk meets. Nodes without in-neighbours start none.
    """
    from gensim.models import Word2Vec  # takes a second to import, and only this encoding needs it

    nodes = np.argsort(np.concatenate([store.array("orig_id", part) for part in range(store.num_parts)]))
    csc = _renumbered(store, nodes)
    observed = store.gather("split", nodes) != UNSEEN
    starts = np.tile(np.flatnonzero(observed & (np.diff(csc.indptr) > 0)), _WALKS)
    generator(seed, Word.WALK_ORDER).shuffle(starts)
    walks = _Walks(_walk(csc.indptr, csc.indices, starts, np.uint64(key(seed, Word.WALK)), _LENGTH))
    pos_ND = np.zeros((store.num_nodes, dim), np.float32)
    if len(starts):
        # One worker: several would update the vectors in an order of chance.
        vectors = Word2Vec(
            walks, vector_size=dim, window=_WINDOW, min_count=1, sg=1, epochs=_EPOCHS, workers=1,
            seed=key(seed, Word.WALK_VECTORS) % 2**32,
        ).wv  # fmt: skip
        pos_ND[nodes[np.array(vectors.index_to_key).astype(np.int64)]] = vectors.get_normed_vectors()
    return lambda part: [pos_ND[store.ids(part)]]


def _renumbered(store: GraphStore, nodes: np.ndarray) -> Csc:
    """The whole graph with `nodes[i]` as node i: in the input's order, so that no partition changes a walk."""
    number = np.empty_like(nodes)
    number[nodes] = np.arange(len(nodes))
    parts = range(store.num_parts)
    dst = np.concatenate([np.repeat(store.ids(part), np.diff(store.array("indptr", part))) for part in parts])
    src = np.concatenate([store.array("indices", part) for part in parts])
    return csc_.build(number[src], number[dst], len(nodes), undirected=False)


class _Walks:
    """Walks as gensim's sentences of words; it reads them more than once."""

    def __init__(self, nodes: np.ndarray):
        self._nodes = nodes

    def __iter__(self) -> Iterator[list[str]]:
        for walk in self._nodes:
            yield [str(node) for node in walk.tolist() if node >= 0]


@njit(cache=True)
def _walk(indptr, indices, starts, walk_key, length):  # type: ignore[no-untyped-def]
    """Uniform random walks against the edges, `[len(starts), length]`; −1 after one that cannot go on."""
    walks = np.full((len(starts), length), -1, indices.dtype)
    for i in range(len(starts)):
        state = mix(walk_key, np.uint64(i))
        node = starts[i]
        walks[i, 0] = node
        for j in range(1, length):
            degree = indptr[node + 1] - indptr[node]
            if degree == 0:
                break
            node = indices[indptr[node] + np.int64(mix(state, np.uint64(j)) % np.uint64(degree))]
            walks[i, j] = node
    return walks
