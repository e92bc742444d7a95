"""Stage `student`: students trained on the soft labels, the RbM's experts sharded over the workers."""

from functools import partial
from typing import Any

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.splits import VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Ensemble, Student, rbm_to_mlp
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.runtime.memory_store import make_memory_store
from rbm_dist.runtime.shard_servers import ShardServers, open_graph
from rbm_dist.serve.accuracy import student_accuracy
from rbm_dist.serve.artifact import empty_student, load_mixture, load_student, save_merged, save_student
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.training import train_on_graph
from rbm_dist.train.loop import Listener
from rbm_dist.train.student import StudentTraining


def run_student(run: Run, start: str | None = None) -> Files:
    """Train every configured student; writes `<run>/student/<model>/model.{json,safetensors}`.

    start: the folder of students that are trained further, see `train_students`.
    """
    train_on_graph(run, "student", partial(train_students, start=start))
    folders = [f"student/{kind}{below}" for kind in run.config.student.models for below in ("", "/experts")]
    names = [f"{folder}/{file}" for folder in folders for file in ("model.json", "model.safetensors")]
    return {name: storage.file_info(run.path(name)) for name in names if storage.exists(run.path(name))}


def train_students(
    mesh: Mesh, reporter: Listener, config: Config, graph_url: str, url: str, track_test: bool = False,
    servers: ShardServers | None = None, token: int = 0, start: str | None = None,
) -> None:  # fmt: skip
    """Train the students one after the other; those that a cut-off run finished are kept.

    start: a folder of such students, which are trained further for `update.epochs`, on the nodes of the array LEARN,
    with a lower rate. One that is then worse on validation than before stays as it was; all are served as they were.

    `track_test` adds each epoch's accuracy on the reported nodes to the metrics; nothing is chosen by it. `token`: of
    the run's owner. Raises `Left` when the driver ordered the group to leave.
    """
    settings, cluster = config.student, config.cluster
    store = open_graph(graph_url, config.teacher.sampler, servers)
    store.hold(mesh.parts(store.num_parts))
    make_memory = partial(
        make_memory_store, cluster.memory_store, mesh, cluster.collective_timeout_s, settings.ema_decay,
        settings.self_similarity, settings.lr, settings.reseed_after,
    )  # fmt: skip
    for kind in settings.models:
        student_url = f"{url}/{kind}"
        if not storage.exists(f"{student_url}/model.json"):
            before, was_merged = (None, False) if start is None else _trained(f"{start}/{kind}", kind)
            training = StudentTraining(
                mesh, reporter, config, store, student_url, kind, make_memory, track_test, token, before
            )
            found = training.run()
            if mesh.rank == 0:
                facts = _facts(config, store, kind, training.hidden)
                best = empty_student(**facts)
                for each, student in zip(found, best.members if isinstance(best, Ensemble) else [best], strict=True):
                    each.load_best(student)
                if before is None:
                    merged = _experts_are_one(best, store, settings.merge_tolerance)
                else:  # whoever serves it need not learn of another form
                    merged = was_merged
                    if _val_accuracy(before, store) > _val_accuracy(best, store):
                        best = before
                (save_merged if merged else save_student)(student_url, best, facts)
        mesh.barrier()


def _facts(config: Config, store: GraphStore, kind: str, hidden: int) -> dict[str, Any]:
    """What `model.json` says of a student."""
    settings = config.student
    return {
        "kind": "mlp" if kind.startswith("mlp") else kind, "inputs": list(settings.inputs),
        "num_features": store.width(settings.inputs), "num_classes": store.num_classes,
        "hidden": hidden, "num_layers": settings.num_layers, "norm": settings.norm,
        "num_experts": settings.num_experts, "top_k": settings.top_k,
        "routing": settings.routing, "routing_temperature": settings.routing_temperature,
        "input_attention": settings.input_attention, "ensemble_size": settings.ensemble_size,
    }  # fmt: skip


def _experts_are_one(best: Student, store: GraphStore, tolerance: float | None) -> bool:
    """Whether validation hardly tells an RbM from the MLP of its averaged experts."""
    if not best.routed_layers or tolerance is None:
        return False
    return _val_accuracy(rbm_to_mlp(best), store) >= _val_accuracy(best, store) - tolerance


def _val_accuracy(student: Student, store: GraphStore) -> float:
    return student_accuracy(student, store, (VAL,))["val"] or 0.0


def _trained(url: str, kind: str) -> tuple[Student, bool]:
    """A student of a run before, with all its experts, and whether an MLP is served in its place."""
    return load_mixture(url) if kind == "rbm" else (load_student(url), False)
