"""What the stages that train have in common: a group of workers on the run's graph."""

from collections.abc import Callable
from typing import Any

from rbm_dist.runtime.shard_servers import shard_servers
from rbm_dist.stages.run import Run


def train_on_graph(run: Run, stage: str, loop: Callable[..., Any]) -> None:
    """Call `loop(mesh, reporter, config, graph_url, url, servers=…, token=…)` on every worker.

    `url` is the stage's folder.
    """
    cluster = run.config.cluster
    with shard_servers(cluster, run.graph_url) as servers:
        arguments = {
            "config": run.config, "graph_url": run.graph_url, "url": run.path(stage), "servers": servers,
            "token": run.token,
        }  # fmt: skip
        assert run.groups is not None, "this run has no workers"
        run.groups.run(stage, loop, arguments, run.path(stage))
