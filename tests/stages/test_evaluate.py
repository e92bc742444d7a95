"""Accuracies and expert loads against counts by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rbm_dist.graph.splits import TEST, VAL
from rbm_dist.models.student import make_mlp, mlp_to_rbm
from rbm_dist.stages import evaluate
from rbm_dist.stages.evaluate import accuracy, expert_load, student_accuracy
from tests.small_graph import small_store


def test_accuracy_asks_only_for_nodes_that_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_ROWS", 7)
    store = small_store(str(tmp_path))
    ids = np.arange(store.num_nodes)
    predicted = np.random.default_rng(0).integers(0, store.num_classes, store.num_nodes)
    split, label = store.gather("split", ids), store.gather("label", ids)
    asked: list[np.ndarray] = []

    def classes(nodes: np.ndarray) -> np.ndarray:
        asked.append(nodes)
        return predicted[nodes]

    found = accuracy(store, classes)
    assert sorted(np.concatenate(asked)) == np.flatnonzero((split == VAL) | (split == TEST)).tolist()
    for name, code in (("val", VAL), ("test", TEST)):
        assert found[name] == np.mean(predicted[split == code] == label[split == code])
    assert found["unseen"] is None


@pytest.mark.parametrize("most", [10**6, 50])
def test_expert_load_and_a_students_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(evaluate, "LOADED_NODES", most)
    monkeypatch.setattr(evaluate, "_ROWS", 64)
    store = small_store(str(tmp_path))
    torch.manual_seed(0)
    mlp = make_mlp(store.num_features, 8, store.num_classes, 2, "layer", 0.0, seed=1)
    memories = [torch.randn(4, width) for width in (store.num_features, 8)]
    student = mlp_to_rbm(mlp, memories, top_k=2).eval()
    nodes = np.arange(240) if most > 240 else np.array([240 * i // 50 for i in range(50)])
    with torch.inference_mode():
        _, traces = student(torch.from_numpy(store.gather("feat", nodes)))
        everyone = student(torch.from_numpy(store.gather("feat", np.arange(240))))[0]
    for load, trace in zip(expert_load(student, store), traces, strict=True):
        chosen = trace.routing.experts_Bk.flatten().tolist()
        assert load == pytest.approx([chosen.count(expert) / len(chosen) for expert in range(4)])
    split, label = store.gather("split", np.arange(240)), store.gather("label", np.arange(240))
    hit = everyone.argmax(1).numpy() == label
    assert student_accuracy(student, store)["test"] == pytest.approx(np.mean(hit[split == TEST]))
