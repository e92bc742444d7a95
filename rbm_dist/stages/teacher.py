"""Stage `teacher`: a GNN on neighbour-sampled mini-batches, or SIGN on rows, data parallel, chosen by validation loss.

Or, with `teacher.external`, a look at the predictions that a model elsewhere made.
"""

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.runtime.shard_servers import ShardServers, open_graph
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.serve.artifact import save_weights
from rbm_dist.stages.external_teacher import EXTERNAL, look_at_external
from rbm_dist.stages.feature_hops import add_feature_hops
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.training import train_on_graph
from rbm_dist.train.loop import Listener
from rbm_dist.train.teacher import trained_teacher


def run_teacher(run: Run) -> Files:
    """Train the teacher; writes `<run>/teacher/model.safetensors`, or `external.json` of a teacher from elsewhere."""
    if run.config.teacher.external is not None:
        arguments = (run.config, run.graph_url, run.path("teacher"))
        (info,) = run_tasks("teacher", look_at_external, [arguments], run.config.cluster)
        return {f"teacher/{EXTERNAL}": info}
    if run.config.teacher.reads_hops:
        add_feature_hops(run, "teacher")
    train_on_graph(run, "teacher", train_teacher)
    return {"teacher/model.safetensors": storage.file_info(run.path("teacher", "model.safetensors"))}


def train_teacher(
    mesh: Mesh, reporter: Listener, config: Config, graph_url: str, url: str, servers: ShardServers | None = None,
    token: int = 0,
) -> None:  # fmt: skip
    """Train on this rank's parts, together with the other ranks. Goes on from the last checkpoint below `url`.

    `token`: of the run's owner. Raises `Left` when the driver ordered the group to leave.
    """
    store = open_graph(graph_url, config.teacher.sampler, servers)
    model = trained_teacher(mesh, reporter, config, store, url, token)
    if mesh.rank == 0:
        save_weights(f"{url}/model.safetensors", model)
    mesh.barrier()
