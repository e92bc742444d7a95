"""The arrays that a hop-precomputed teacher reads: made by the stage `teacher`, gone after the stage `soft_labels`."""

from functools import partial

from rbm_dist import storage
from rbm_dist.graph.feature_hops import ARRAYS, add_hops
from rbm_dist.graph.store import GraphStore
from rbm_dist.runtime.shard_servers import shard_servers
from rbm_dist.stages.encodings import over_tasks
from rbm_dist.stages.run import Run


def add_feature_hops(run: Run, stage: str) -> None:
    """Add the arrays that a hop-precomputed teacher reads to the graph, if they are not there."""
    store = GraphStore.open(run.graph_url)
    with shard_servers(run.config.cluster, run.graph_url) as servers:
        add_hops(store, run.config.teacher.hops, partial(over_tasks, run, stage, store.num_parts, servers))


def reset_feature_hops(url: str) -> None:
    """Remove them, unfinished ones too."""
    graph = storage.join(url, "graph")
    if storage.exists(storage.join(graph, "graph.json")):
        GraphStore.open(graph).remove_matching(ARRAYS)
