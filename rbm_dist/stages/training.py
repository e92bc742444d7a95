"""What the stages that train have in common: a group of workers on the run's graph."""

from collections.abc import Callable
from typing import Any

from rbm_dist.runtime.shard_servers import shard_servers
from rbm_dist.runtime.training import run_training
from rbm_dist.stages.run import Run


def train_on_graph(run: Run, stage: str, loop: Callable[..., Any]) -> None:
    """Call `loop(mesh, reporter, config, graph_url, url, servers=…)` on every worker; `url` is the stage's folder."""
    cluster, shared = run.config.cluster, run.config.expert_parallel
    with shard_servers(cluster, run.graph_url) as servers:
        arguments = {"config": run.config, "graph_url": run.graph_url, "url": run.path(stage), "servers": servers}
        run_training(stage, loop, arguments, cluster, shared, run.reporter, run.path(stage, "ray_train"))
