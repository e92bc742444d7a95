"""Stage `encodings`: positional encodings and propagated labels of every node, as arrays of the graph.

Ray tasks, not actors: there are many short steps, and tasks share processes that are already warm.
"""

from functools import partial

from rbm_dist import storage
from rbm_dist.graph import encodings
from rbm_dist.graph.encodings import POS, PROP, Step
from rbm_dist.graph.store import GraphStore
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.shard_servers import ShardServers, open_graph, shard_servers
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.stages.run import Files, Run

ARRAYS = rf"({POS}|{PROP})(_(observed|hop\d+|step\d+))?"
"""A regular expression of the names of all arrays that the stage makes, on the way too."""


def run_encodings(run: Run) -> Files:
    """Write the configured arrays, `pos` (`[N, positional_dim]`) and `prop` (`[N, C]`), both float32, of every part."""
    config, store = run.config, GraphStore.open(run.graph_url)
    with shard_servers(config.cluster, run.graph_url) as servers:
        over = partial(over_tasks, run, "encodings", store.num_parts, servers)
        encodings.encode(store, config.encodings, config.seed, over)
    files: Files = {}
    for name in encodings.arrays(config.encodings):
        files |= storage.read_json(run.path("graph", f"{name}.json"))["files"]
    return {f"graph/{name}": info for name, info in files.items()}


def reset_encodings(url: str) -> None:
    """Remove the arrays that this stage added to the graph, unfinished ones too."""
    graph = storage.join(url, "graph")
    if storage.exists(storage.join(graph, "graph.json")):
        GraphStore.open(graph).remove_matching(ARRAYS)


def over_tasks(
    run: Run, stage: str, num_parts: int, servers: ShardServers | None, step: Step
) -> list[storage.FileInfo]:  # fmt: skip
    """Fill a step's array in all parts, in Ray tasks of a stage."""
    parts = list(range(num_parts))
    groups = [parts] if step.together else [[part] for part in parts]
    arguments = [(run.graph_url, step, group, run.reporter, servers, stage) for group in groups]
    return [info for files in run_tasks(stage, _fill, arguments, run.config.cluster) for info in files]


def _fill(
    graph_url: str, step: Step, parts: list[int], reporter: Reporter, servers: ShardServers | None, stage: str
) -> list[storage.FileInfo]:  # fmt: skip
    store = open_graph(graph_url, servers=servers)
    store.hold(parts)
    files = encodings.fill(step, store, parts)
    done = sum(len(store.ids(part)) for part in parts)
    reporter.add(f"{stage}: {step.name}", done, store.num_nodes, "nodes")
    return files
