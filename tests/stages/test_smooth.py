"""Smoothing as a part of the stage `soft_labels`, in this process, whoever the teacher is; and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist import storage
from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.encodings import Step, fill
from rbm_dist.graph.feature_hops import add_hops
from rbm_dist.graph.splits import VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.teacher import build_teacher
from rbm_dist.serve.artifact import save_weights
from rbm_dist.sources.facts import SourceFacts
from rbm_dist.stages.external_teacher import look_at_external
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.plan import Hosts, plan_stages
from rbm_dist.stages.plan_cost import Costs
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from tests.graph.test_smooth import dense
from tests.small_graph import small_graph, write_graph

CLASSES, NODES = 5, 240
GRAPH = small_graph()
TEACHERS: dict[str, dict[str, Any]] = {
    "sampled": {"teacher": {"fanout": [-1, -1]}},
    "exact": {"soft_labels": {"inference": "exact", "hidden": True}},
    "sign": {"teacher": {"model": "sign", "hops": 2}},
    "external": {"teacher": {"external": {"paths": ["said.npy"], "kind": "logits"}}},
}


def prepared(folder: Path, kind: str, **smoothing: Any) -> Run:
    """A graph whose ids are the input's, in three parts, and a teacher that was not trained."""
    store = write_graph(str(folder), GRAPH, (np.arange(NODES) * 3 // NODES).astype(np.int32))
    np.save(
        folder / "said.npy", 2 * np.eye(CLASSES)[GRAPH.label] + np.random.default_rng(0).normal(size=(NODES, CLASSES))
    )
    tree = {"run_dir": str(folder), "seed": 3, "partition": {"num_parts": 3}} | TEACHERS[kind]
    tree["teacher"] = {"hidden": 16, **tree.get("teacher", {})}
    if kind == "external":
        tree["teacher"]["external"] = {"paths": [str(folder / "said.npy")], "kind": "logits"}
    tree["soft_labels"] = {**tree.get("soft_labels", {}), "smooth": smoothing}
    config = Config.model_validate(tree)
    run = Run(config, str(folder), MetricsRecorder())
    if kind == "external":
        look_at_external(config, run.graph_url, run.path("teacher"))
        return run
    model = build_teacher(config, store.num_features, CLASSES)
    save_weights(f"{folder}/teacher/model.safetensors", model)
    if kind == "sign":
        add_hops(store, 2)
    return run


def soft(run: Run) -> np.ndarray:
    return GraphStore.open(run.graph_url).gather("soft", np.arange(NODES))


def arrays(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.npy")}


@pytest.mark.parametrize("kind", TEACHERS)
def test_any_teacher_is_smoothed_and_nothing_else_is_left(tmp_path: Path, kind: str) -> None:
    plain = prepared(tmp_path / "plain", kind)
    write_soft_labels(plain, over_parts_here)
    run = prepared(tmp_path / "smoothed", kind, method="correct_and_smooth", steps=4)
    listed = write_soft_labels(run, over_parts_here)
    np.testing.assert_allclose(soft(run), dense(GRAPH, soft(plain), "correct_and_smooth", 4, 0.5), rtol=1e-3, atol=1e-5)
    assert arrays(tmp_path / "smoothed") == arrays(tmp_path / "plain")
    val = GRAPH.split == VAL
    figures = storage.read_json(f"{tmp_path}/smoothed/soft_labels/unsmoothed.json")
    assert figures["val"] == pytest.approx((soft(plain).argmax(1) == GRAPH.label)[val].mean())
    assert "soft_labels/unsmoothed.json" in listed
    assert write_soft_labels(run, over_parts_here) == listed, "again: nothing is computed, the same files are named"
    storage.write_json(f"{run.graph_url}/smooth3.json", {})  # as a kill leaves it
    reset_soft_labels(run.url)
    assert not [
        path for path in (tmp_path / "smoothed" / "graph").rglob("*") if "smooth" in path.name or "soft" in path.name
    ]


@pytest.mark.parametrize("store", ["float32", "top_m"])
@pytest.mark.parametrize(("method", "steps"), [("appnp", 1), ("appnp", 2), ("correct_and_smooth", 5)])
def test_the_plan_knows_the_disk(tmp_path: Path, method: str, steps: int, store: str) -> None:
    run = prepared(tmp_path, "external", method=method, steps=steps)
    settings = run.config.soft_labels.model_copy(update={"store": store, "top_m": 2})
    run = Run(run.config.model_copy(update={"soft_labels": settings}), run.url, run.reporter)
    graph, sizes = GraphStore.open(run.graph_url), []
    before = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))

    def watched(step: Step) -> list[storage.FileInfo]:
        infos = fill(step, graph, range(3))
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) - before)
        return infos

    write_soft_labels(run, over_parts_here, run_step=watched)
    facts = SourceFacts(NODES, GRAPH.csc.num_edges, GRAPH.num_features, CLASSES, 72, 72, streamed=False)
    written, kept, *_ = Costs(run.config, facts, 1, 1).soft_labels()
    headers = 128 * 3 * 4
    assert max(sizes) - headers <= written <= max(sizes)
    (stage,) = (each for each in plan_stages(run.config, facts, Hosts(1, 2**33, 2)) if each.name == "soft_labels")
    assert "smoothing task" in {process.kind for step in stage.steps for process in step}
    assert kept == (20 if store == "float32" else 8) * NODES


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["soft_labels.entropy_change=true"],
            r"soft_labels\.smooth: soft_labels\.entropy_change .*smooth\.method: none",
        ),
        (
            ["teacher.external={paths: [a.npy], kind: logits, missing: labels}"],
            r"soft_labels\.smooth: needs a prediction for every node; .*teacher\.external\.missing: refuse",
        ),
    ],
)
def test_what_cannot_be_smoothed_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load("configs/quickstart.yaml", ["soft_labels.smooth.method=appnp", *keys])
