"""Predictions of a student for the nodes of a run's graph, with the caller's own node ids."""

from collections.abc import Generator, Iterable

import pyarrow as pa

from rbm_dist.graph.shards import ORIG_NAME
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve import kernels
from rbm_dist.serve.network import Network, Networks
from rbm_dist.serve.prediction_files import Predictions
from rbm_dist.sources import node_ids

ID_ARRAYS = ("orig_id", ORIG_NAME)
"""The arrays of a graph that predictions need besides a student's inputs."""
_ROWS = 16_384


def predict(
    network: Network | Networks, inputs: tuple[str, ...], store: GraphStore, parts: Iterable[int] | None = None
) -> Generator[Predictions, None, None]:
    """Predictions for the nodes of some parts (default: all), in chunks, part by part. inputs: the arrays of a row."""
    for part in range(store.num_parts) if parts is None else parts:
        ids, orig_id = store.ids(part), store.array(ORIG_NAME if store.named else "orig_id", part)
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            probability_nC = network.logits(store.inputs(ids[rows], inputs))
            kernels.softmax(probability_nC)
            yield Predictions(node_ids.to_arrow(orig_id[rows], store.id_type), probability_nC)


def id_type(store: GraphStore) -> pa.DataType:
    """The type that the caller's ids had."""
    return node_ids.arrow_type(store.id_type.arrow)
