"""Exact when sharded: the loss curve and the weights do not depend on how many ranks carry the work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rbm_dist.config.run import Config
from rbm_dist.config.update import UpdateConfig
from rbm_dist.graph.reach import LEARN
from rbm_dist.moe.sparse_rows import Rows
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.stages.student import train_students
from rbm_dist.train.kmeans import kmeans_centres
from tests.curves import computed
from tests.gloo import run_ranks
from tests.small_graph import small_store

HOSTS = "babab"  # of the ranks: other parts than in the order of the ranks
CUT_OFF = "cut off|Connection closed by peer"  # on the rank that fails, on the others


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def begin(self, loop: str, history: list[dict[str, float]]) -> None:
        self.rows.append((f"begin {loop}", len(history), {}))

    def progress(self, *_: Any) -> None: ...

    def order(self) -> str:
        return "go"

    def heartbeat(self, *_: Any) -> None: ...

    def saved(self, *_: Any) -> None: ...

    def end(self, *_: Any) -> None: ...

    def metrics(self, loop: str, row: dict[str, float]) -> None:
        self.rows.append((loop, int(row["epoch"]), row))


def config(url: str, **student: Any) -> Config:
    settings = {
        "models": ["rbm"], "hidden": 16, "epochs": 9, "pretrain_epochs": 3, "batch_size": 40, "num_experts": 5,
        "top_k": 2, "label_weight": 0.3, "temperature": 2.0, "dropout": 0.0, "merge_tolerance": None,
    }  # fmt: skip
    return Config.model_validate(
        {
            "run_dir": url,
            "partition": {"num_parts": 4},
            "soft_labels": {"entropy_change": True, "hidden": True},
            "student": settings | student,
            "cluster": {"memory_store": "in_process", "checkpoint_every": 3},
        }
    )


def train(
    rank: int, expert_parallel: int, graph: str, url: str, student: dict[str, Any], further: bool = False
) -> list[Any]:  # fmt: skip
    torch.set_default_dtype(torch.float64)
    mesh = Mesh.init(expert_parallel, torch.device("cpu"), HOSTS[rank])
    recorder = Recorder()
    settings = config(url, **student)
    train_students(mesh, recorder, settings, f"{graph}/graph", url)
    if further:  # as when the graph has changed
        settings = settings.model_copy(update={"update": UpdateConfig(run=url, add_edges="edges.parquet", epochs=2)})
        train_students(mesh, recorder, settings, f"{graph}/graph", f"{url}/further", start=url)
    return recorder.rows


def train_each(
    rank: int, expert_parallel: int, graph: str, url: str, students: dict[str, dict[str, Any]]
) -> dict[str, list[Any]]:
    """One process group for many trainings: starting ranks is what takes time."""
    return {
        name: train(rank, expert_parallel, graph, f"{url}/{name}", each, further="dropout" in name or "moe" in name)
        for name, each in students.items()
    }


def final_weights(url: str, kind: str = "rbm") -> dict[str, torch.Tensor]:
    return load_file(f"{url}/{kind}/model.safetensors")


KRD = {"objective": "krd", "krd": {"min_update_epoch": 1}}
# 6 steps an epoch, 9 epochs; the first 3 are the plain network's.
STUDENTS: dict[str, dict[str, Any]] = {
    "kd, batch norm": {"norm": "batch", "routing": "layers"},
    "kd, layer norm": {"norm": "layer", "input_attention": True, "clip_norm": 0.05}
    | {"lr_schedule": "cosine", "warmup_steps": 4},
    "krd, batch norm": {"norm": "batch", "reseed_after": 2} | KRD,
    "krd, layer norm": {"norm": "layer", "routing": "layers", "routing_temperature": 0.2}
    | {"objective": "krd", "krd": {"min_update_epoch": 1, "neighbours": "all"}},
    "dropout": {"norm": "layer", "dropout": 0.4} | KRD,
    "vanilla moe": {"models": ["moe"], "dropout": 0.2},
    "nosmog": {"norm": "batch", "similarity": 0.5, "adversarial": {"weight": 0.5, "steps": 2}},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[Any]]]:
    """The folder of a graph and of what one process makes of it; the curves of that."""
    folder = str(tmp_path_factory.mktemp("exact"))
    store = small_store(folder)
    learn = [store.gather("orig_id", store.ids(part)) % 2 == 0 for part in range(store.num_parts)]
    store.publish(LEARN, [store.write_part(LEARN, part, rows.dtype, (), [rows]) for part, rows in enumerate(learn)])
    references = run_ranks(train_each, 1, 1, folder, f"{folder}/1x1", STUDENTS)[0]
    for name, reference in references.items():
        losses = [row[2]["loss"] for row in reference if row[2]]
        assert len(losses) * 6 >= 50, "steps"
        assert losses[-1] < losses[4], f"{name}: the routed network learns"
    assert len({row[2]["krd_power"] for row in references["krd, batch norm"] if row[2]}) > 5, "q is fitted"
    return folder, references


SLOW_LAYOUTS = [(2, 1), (4, 2), (3, 3), (4, 1), (5, 5)]


# Ranks, and ranks per set of experts. Five ranks for four parts and five experts: one rank has no rows.
@pytest.mark.parametrize(
    ("world", "expert_parallel"), [(2, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_LAYOUTS)]
)
def test_curves_of_all_layouts_agree(
    references: tuple[str, dict[str, list[Any]]], world: int, expert_parallel: int
) -> None:
    folder, curves = references
    url = f"{folder}/{world}x{expert_parallel}"
    students = STUDENTS if (world, expert_parallel) in [(2, 2), (4, 2)] else dict(list(STUDENTS.items())[:4])
    found = run_ranks(train_each, world, expert_parallel, folder, url, students)[0]
    for name in students:
        reference = curves[name]
        where = f"{name}, {world} ranks, {expert_parallel} per set of experts"
        assert [row[:2] for row in found[name]] == [row[:2] for row in reference]
        for row, expected in zip(found[name], reference, strict=True):
            same = pytest.approx(computed(expected[2]), rel=1e-9, abs=1e-12)
            assert computed(row[2]) == same, f"{where}, epoch {row[1]}"
            shards = expert_parallel > 1 and "routed_mb" in row[2]
            assert shards == (expert_parallel > 1 and row[0] in ("rbm", "moe") and bool(row[2]))
            if shards:
                assert 0 < row[2]["least_mb"] < row[2]["routed_mb"] < row[2]["sent_mb"]
                assert 0 < row[2]["stayed"] < 1
        kind = STUDENTS[name].get("models", ["rbm"])[0]
        weights = final_weights(f"{folder}/1x1/{name}", kind)
        for key, tensor in final_weights(f"{url}/{name}", kind).items():
            assert tensor.dtype == torch.float64
            np.testing.assert_allclose(tensor, weights[key], rtol=1e-8, atol=1e-11, err_msg=f"{where}: {key}")


def test_a_run_cut_off_goes_on_along_the_same_curve_on_other_layouts(tmp_path: Path) -> None:
    graph, student = str(tmp_path), {"dropout": 0.2, "norm": "batch", "epochs": 10, "pretrain_epochs": 2} | KRD
    small_store(graph)
    reference = run_ranks(train, 1, 1, graph, f"{tmp_path}/undisturbed", student)[0]
    url = f"{tmp_path}/cut"
    with pytest.raises(Exception, match=CUT_OFF):
        run_ranks(train_until, 2, 2, graph, url, student, ("rbm/pretrain", 1))
    with pytest.raises(Exception, match=CUT_OFF):
        run_ranks(train_until, 4, 4, graph, url, student, ("rbm", 4))
    with pytest.raises(Exception, match=CUT_OFF):
        run_ranks(train_until, 1, 1, graph, url, student, ("rbm", 6))
    rows = run_ranks(train, 3, 3, graph, url, student)[0]
    assert ("begin rbm", 6, {}) in rows, "it goes on from the checkpoint after six routed epochs"
    assert rows[-1][:2] == reference[-1][:2]
    for (_, epoch, found), (_, expected_epoch, expected) in zip(rows[-2:], reference[-2:], strict=True):
        assert epoch == expected_epoch
        assert computed(found) == pytest.approx(computed(expected), rel=1e-9, abs=1e-12)
    weights = final_weights(f"{tmp_path}/undisturbed")
    for name, tensor in final_weights(url).items():
        np.testing.assert_allclose(tensor, weights[name], rtol=1e-8, atol=1e-11, err_msg=name)


def test_a_resume_of_routed_training_does_no_k_means_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clustered: list[int] = []

    def counted(rows: Rows, ids: np.ndarray, num_experts: int, seed: int, mesh: Mesh) -> np.ndarray:
        clustered.append(num_experts)
        return kmeans_centres(rows, ids, num_experts, seed, mesh)

    monkeypatch.setattr("rbm_dist.train.student.kmeans_centres", counted)
    small_store(str(tmp_path))
    graph, settings = f"{tmp_path}/graph", {"routing": "layers", "self_similarity": 0.1, "reseed_after": 2}

    def train_here(name: str, recorder: Recorder) -> None:
        url = f"{tmp_path}/{name}"
        train_students(Mesh.single(), recorder, config(url, **settings), graph, url)

    whole, again = Recorder(), Recorder()
    train_here("whole", whole)
    for epoch in (1, 4):  # before it has a checkpoint; with one of three routed epochs
        with pytest.raises(RuntimeError, match="cut off"):
            train_here("cut", Cutter(("rbm", epoch)))
    assert clustered == [5, 5] * 2, "once for each layer, in each of the two runs"
    train_here("cut", again)
    assert len(clustered) == 4, "the memories are those of the checkpoint"
    assert [row[:2] for row in again.rows] == [
        ("begin rbm/pretrain", 3),
        ("begin rbm", 3),
        *(("rbm", k) for k in (3, 4, 5)),
    ]
    last, expected = ([computed(row) for *_, row in each.rows[-3:]] for each in (again, whole))
    assert last == expected
    weights = final_weights(f"{tmp_path}/whole")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in final_weights(f"{tmp_path}/cut").items())


class Cutter(Recorder):
    """Fails after one loop's epoch, as a killed process would."""

    def __init__(self, at: tuple) -> None:
        super().__init__()
        self.at = at

    def metrics(self, loop: str, row: dict[str, float]) -> None:
        if (loop, row["epoch"]) == self.at:
            raise RuntimeError("cut off")


def train_until(rank: int, expert_parallel: int, graph: str, url: str, student: dict[str, Any], at: tuple) -> None:
    """Train, and fail after one loop's epoch."""
    torch.set_default_dtype(torch.float64)
    mesh = Mesh.init(expert_parallel, torch.device("cpu"))
    train_students(mesh, Cutter(at), config(url, **student), f"{graph}/graph", url)
