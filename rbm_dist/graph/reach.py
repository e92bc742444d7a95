"""How far a change of a graph reaches: the layer of a GNN from which on a node's state is another than before."""

import numpy as np
from numba import njit

from rbm_dist.graph.store import GraphStore

TOUCHED = "touched"
"""The array of what `reach` gives."""
LEARN = "learn"
"""The array of which nodes students are trained on further after a change, `[N]` bool."""
UNTOUCHED = -1


def reach(store: GraphStore, rows: np.ndarray, destinations: np.ndarray, hops: int) -> np.ndarray:
    """Per node the first layer, of so many, after which its state may differ; 0: its features do. `[N]` int8.

    store: the changed graph, all of whose parts are read. rows: nodes that are new or have other features;
    destinations: those whose in-edges are others. UNTOUCHED: none. Memory: 2 bytes per node; a pass over the edges
    for each hop.
    """
    first_N = np.full(store.num_nodes, UNTOUCHED, np.int8)
    first_N[rows] = 0
    for hop in range(1, hops + 1):
        touched_N = first_N >= 0
        for part in range(store.num_parts):
            low, high = store.offsets[part : part + 2]
            _spread(store.array("indptr", part), store.array("indices", part), touched_N, hop, first_N[low:high])
        if hop == 1:
            edited = destinations[first_N[destinations] < 0]
            first_N[edited] = 1
    return first_N


def is_touched(store: GraphStore, part: int, layer: int) -> np.ndarray:
    """Which nodes of a part have a state after some layer that may differ, by the array TOUCHED, `[n]` bool."""
    first_n = store.array(TOUCHED, part)
    return (first_n != UNTOUCHED) & (first_n <= layer)


def touched_nodes(store: GraphStore, layer: int) -> int:
    """How many nodes of all parts have such a state."""
    return sum(int(is_touched(store, part, layer).sum()) for part in range(store.num_parts))


@njit(cache=True, nogil=True)
def _spread(indptr, indices, touched_N, hop, first_n):  # type: ignore[no-untyped-def]
    """Note the hop for nodes of which an in-neighbour is touched."""
    for v in range(len(first_n)):
        if first_n[v] >= 0:
            continue
        for e in range(indptr[v], indptr[v + 1]):
            if touched_N[indices[e]]:
                first_n[v] = hop
                break
