"""Accuracies, expert loads and what experts are worth, against counts and formulas by hand."""

import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import torch

from rbm_dist.errors import InputError
from rbm_dist.graph.splits import TEST, VAL
from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.serve import accuracy as accuracy_
from rbm_dist.serve import specialisation
from rbm_dist.serve.accuracy import hits, student_accuracy
from rbm_dist.serve.artifact import load_mixture, load_student, save_merged, save_student
from rbm_dist.serve.specialisation import distances, expert_load, expert_rows, mixture_figures
from tests.serve.reference import class_probabilities, random_student
from tests.small_graph import small_store


def test_accuracy_asks_only_for_nodes_that_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_, "_ROWS", 7)
    store = small_store(str(tmp_path))
    ids = np.arange(store.num_nodes)
    predicted = np.random.default_rng(0).integers(0, store.num_classes, store.num_nodes)
    split, label = store.gather("split", ids), store.gather("label", ids)
    asked: list[np.ndarray] = []

    def classes(nodes: np.ndarray) -> np.ndarray:
        asked.append(nodes)
        return predicted[nodes]

    counted = hits(store, classes)
    found = counted.accuracy()
    by_part = [hits(store, lambda ids: predicted[ids], parts=[part]) for part in range(store.num_parts)]
    assert functools.reduce(operator.add, by_part).accuracy() == found
    assert sorted(np.concatenate(asked)) == np.flatnonzero((split == VAL) | (split == TEST)).tolist()
    for name, code in (("val", VAL), ("test", TEST)):
        assert found[name] == np.mean(predicted[split == code] == label[split == code])
        for cls, share in enumerate(counted.by_class(code)):
            nodes = (split == code) & (label == cls)
            assert share == (np.mean(predicted[nodes] == cls) if nodes.any() else None)
    assert found["unseen"] is None


@pytest.mark.parametrize("most", [10**6, 50])
def test_expert_load_and_a_students_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(specialisation, "LOADED_NODES", most)
    monkeypatch.setattr(accuracy_, "_ROWS", 64)
    store = small_store(str(tmp_path))
    torch.manual_seed(0)
    mlp = make_mlp(store.num_features, 8, store.num_classes, 2, "layer", 0.0, seed=1)
    memories = [torch.randn(4, width) for width in (store.num_features, 8)]
    student = mlp_to_rbm(mlp, memories, top_k=2).eval()
    nodes = np.arange(240) if most > 240 else np.array([240 * i // 50 for i in range(50)])
    with torch.inference_mode():
        _, traces = student(torch.from_numpy(store.gather("feat", nodes)))
        everyone = student(torch.from_numpy(store.gather("feat", np.arange(240))))[0]
    by_part = [expert_rows(student, store, [part]) for part in range(store.num_parts)]
    rows_ME = [sum(rows_PE) for rows_PE in zip(*by_part, strict=True)]
    for rows_E, whole_E in zip(rows_ME, expert_rows(student, store), strict=True):
        np.testing.assert_array_equal(rows_E, whole_E)
    for load, trace in zip(expert_load(rows_ME), traces, strict=True):
        chosen = trace.routing.experts_Bk.flatten().tolist()
        assert load == pytest.approx([chosen.count(expert) / len(chosen) for expert in range(4)])
    split, label = store.gather("split", np.arange(240)), store.gather("label", np.arange(240))
    hit = everyone.argmax(1).numpy() == label
    assert student_accuracy(student, store)["test"] == pytest.approx(np.mean(hit[split == TEST]))


def test_splits_that_are_not_asked_for_are_not_looked_at(tmp_path: Path) -> None:
    store = small_store(str(tmp_path))
    asked: list[np.ndarray] = []

    def classes(nodes: np.ndarray) -> np.ndarray:
        asked.append(nodes)
        return np.zeros(len(nodes), np.int64)

    assert hits(store, classes, (VAL,)).accuracy().keys() == {"val"}
    assert set(store.gather("split", np.concatenate(asked)).tolist()) == {VAL}


@pytest.mark.parametrize("routing", ["input", "layers"])
def test_figures_of_a_mixture(tmp_path: Path, routing: str) -> None:
    store = small_store(str(tmp_path))
    student, _ = random_student("rbm", store.num_features, store.num_classes, routing=routing, top_k=1)
    figures = mixture_figures(student, store)
    ids = np.arange(store.num_nodes)
    feat, label = store.gather("feat", ids), store.gather("label", ids)
    on_test = store.gather("split", ids) == TEST

    def right(each: Student) -> float:
        return float(np.mean((class_probabilities(each, feat).argmax(1) == label)[on_test]))

    assert figures["test"] == pytest.approx(right(student))
    assert figures["effective_experts"] == pytest.approx(
        [np.exp(-sum(share * np.log(share) for share in load if share)) for load in figures["expert_load"]]
    )
    weights = {name: tensor.double().numpy() for name, tensor in student.state_dict().items()}
    for index, distance in enumerate(figures["distance_per_layer"]):
        each = weights[f"layers.{index}.experts.weight_LDO"]
        mean = each.mean(0)
        squares = [np.sum((one - mean) ** 2) for one in each], [np.sum(one**2) for one in each]
        assert distance == pytest.approx(np.sqrt(np.mean(squares[0]) / np.mean(squares[1])))
    same = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for name, tensor in same.items():
        if name.endswith("memory_ED"):
            same[name] = tensor[[5, 0, 1, 2, 3, 4]]
    assert figures["permuted"]["test"] == pytest.approx(right(with_weights(student, same, routing)))
    averaged = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for name, tensor in averaged.items():
        if ".experts." in name:
            averaged[name] = tensor.mean(0, keepdim=True).expand_as(tensor).contiguous()
    assert figures["averaged"]["test"] == pytest.approx(right(with_weights(student, averaged, routing)))


def with_weights(student: Student, weights: dict[str, torch.Tensor], routing: str) -> Student:
    width, classes = student.memories[0].shape[1], len(weights["layers.2.experts.bias_LO"][0])
    other, _ = random_student("rbm", width, classes, routing=routing, top_k=1)
    other.load_state_dict(weights)
    return other


def test_copies_have_no_distance_and_strangers_nearly_one() -> None:
    mlp = make_mlp(6, 8, 3, 2, "layer", 0.0, seed=1)
    student = mlp_to_rbm(mlp, [torch.randn(64, 6)], top_k=1)
    assert distances(student) == pytest.approx([0.0, 0.0], abs=1e-6)
    torch.manual_seed(0)
    for layer in student.routed_layers:
        layer.experts.weight_LDO.data.normal_()
    assert distances(student) == pytest.approx([1.0, 1.0], abs=0.05)


def test_a_merged_rbm_is_served_as_an_mlp_and_keeps_its_experts(memory_url: str) -> None:
    student, facts = random_student("rbm", routing="input")
    save_student(memory_url, student, facts)
    assert load_mixture(memory_url)[1] is False
    save_merged(memory_url, student, facts)
    served, (mixture, merged) = load_student(memory_url), load_mixture(memory_url)
    assert merged
    assert not served.routed_layers
    assert all(torch.equal(tensor, mixture.state_dict()[name]) for name, tensor in student.state_dict().items())
    with pytest.raises(InputError, match="no such file"):
        load_student(f"{memory_url}/elsewhere")
