"""The figures of the experts against plain numpy and scikit-learn over all nodes at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.serve import experts
from rbm_dist.serve.experts import expert_figures, input_maps
from rbm_dist.sources.source import SourceGraph
from tests.small_graph import small_graph, write_graph

EXPERTS, TOP_K, HIDDEN, CLASSES, NODES = 6, 2, 16, 5, 240


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def partly_labelled() -> SourceGraph:
    graph = small_graph()
    return replace(graph, label=np.where(np.random.default_rng(2).random(NODES) < 0.2, -1, graph.label))


def random_rbm(num_features: int, num_experts: int = EXPERTS, top_k: int = TOP_K) -> Student:
    """In its second layer, whose inputs are not negative, the memory of the last expert points away from all rows."""
    rng = np.random.default_rng(3)
    first = rng.normal(size=(num_experts, num_features))
    second = np.abs(rng.normal(size=(num_experts, HIDDEN)))
    if num_experts > 1:
        second[-1] = -1
    mlp = make_mlp(num_features, HIDDEN, CLASSES, 2, "none", dropout=0.0, seed=0)
    memories = [torch.from_numpy(each.astype(np.float32)) for each in (first, second)]
    return mlp_to_rbm(mlp, memories, top_k).eval()


@pytest.fixture
def store(tmp_path: Path) -> GraphStore:
    parts = np.random.default_rng(4).integers(0, 3, NODES).astype(np.int32)
    return write_graph(str(tmp_path), partly_labelled(), parts)


def dense_inputs(student: Student) -> list[np.ndarray]:
    """By original id: the inputs of both layers. The experts are copies, so their mixture is one of them."""
    feat = next(partly_labelled().feat_chunks()).astype(np.float64)
    layer = student.routed_layers[0]
    weight, bias = layer.experts.weight_LDO[0].detach().numpy(), layer.experts.bias_LO[0].detach().numpy()
    return [feat, np.maximum(feat @ weight + bias, 0)]


def expected_expert(
    expert: int, x: np.ndarray, memory: np.ndarray, label: np.ndarray, bucket: np.ndarray
) -> dict[str, Any]:
    """One expert's figures over all nodes, from the formulas alone."""
    cosine = unit(x) @ unit(memory).T
    rank = np.argsort(np.argsort(-cosine, axis=1), axis=1)[:, expert]
    chosen = rank < TOP_K
    best = -np.sort(-cosine, axis=1)[:, :TOP_K]
    weight = np.where(chosen, np.exp(cosine[:, expert]) / np.exp(best).sum(1), 0)
    nearest = np.argsort(-cosine[:, expert])[:5]
    by_class = np.array([weight[label == c].sum() for c in range(CLASSES)])
    by_degree = np.array([weight[bucket == q].sum() for q in range(bucket.max() + 1)])
    whole = np.bincount(bucket) / NODES
    figures: dict[str, Any] = {
        "expert": expert, "dead": not chosen.any(), "pair_share": chosen.sum() / (NODES * TOP_K),
        "first_choice_share": np.mean(rank == 0),
        "nearest": [
            {"node_id": n, "class": None if label[n] < 0 else label[n], "cosine": cosine[n, expert]} for n in nearest
        ],
    }  # fmt: skip
    if not chosen.any():
        empty = ("class", "class_name", "purity", "class_share", "degree_share", "degree_lift", "mean_cosine")
        return figures | dict.fromkeys(empty)
    return figures | {
        "class": by_class.argmax(), "class_name": None, "purity": by_class.max() / by_class.sum(),
        "class_share": by_class / by_class.sum(),
        "degree_share": by_degree / by_degree.sum(), "degree_lift": by_degree / by_degree.sum() / whole,
        "mean_cosine": cosine[chosen, expert].mean(),
    }  # fmt: skip


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Through dicts and lists, numbers within float32's rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for name, value in expected.items():
            assert_same(found[name], value, f"{path}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}[{index}]")
    elif expected is None:
        assert found is None, path
    else:
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-6), path


@pytest.mark.parametrize("chunk", [7, 4096])
def test_figures_are_those_of_the_formulas(store: GraphStore, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(experts, "_ROWS", chunk)
    student, graph = random_rbm(12), partly_labelled()
    figures = expert_figures(student, store, ("feat",))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures

    degree = np.diff(graph.csc.indptr)
    edges = np.quantile(degree, [0.25, 0.5, 0.75], method="inverted_cdf")
    bucket = (degree[:, None] > edges).sum(1)
    assert_same(
        figures["degree_buckets"],
        [
            {"from": 0 if q == 0 else edges[q - 1] + 1, "to": [*edges, degree.max()][q], "share": np.mean(bucket == q)}
            for q in range(4)
        ],
    )
    labelled = graph.label >= 0
    assert figures["labelled_nodes"] == labelled.sum() < figures["num_nodes"] == NODES
    assert_same(figures["class_share"], list(np.bincount(graph.label[labelled]) / labelled.sum()))

    for layer, x, routed in zip(figures["layers"], dense_inputs(student), student.routed_layers, strict=True):
        memory = routed.memory_ED.double().numpy()
        for expert in range(EXPERTS):
            assert_same(
                layer["experts"][expert], expected_expert(expert, x, memory, graph.label, bucket), f"[{expert}]"
            )
        cosine = unit(x) @ unit(memory).T
        best = -np.sort(-cosine, axis=1)[:, :TOP_K]
        gate = np.exp(best) / np.exp(best).sum(1, keepdims=True)
        load = np.array([expert["pair_share"] for expert in layer["experts"]])
        load = load[load > 0]
        similarity = unit(memory) @ unit(memory).T - 2 * np.eye(EXPERTS)
        closest = np.unravel_index(similarity.argmax(), similarity.shape)
        assert_same(
            {name: value for name, value in layer.items() if name != "experts"},
            {
                "num_experts": EXPERTS, "top_k": TOP_K,
                "load_entropy_bits": -(load * np.log2(load)).sum(), "load_entropy_max_bits": np.log2(EXPERTS),
                "gate_entropy_bits": -(gate * np.log2(gate)).sum(1).mean(), "gate_entropy_max_bits": 1,
                "class_nmi": normalized_mutual_info_score(graph.label[labelled], cosine.argmax(1)[labelled]),
                "closest_memories": {"experts": sorted(int(e) for e in closest), "cosine": similarity.max()},
                "dead_experts": [e for e in range(EXPERTS) if layer["experts"][e]["dead"]],
            },
        )  # fmt: skip
    assert EXPERTS - 1 in figures["layers"][1]["dead_experts"]


def test_inputs_are_joined_in_their_order(store: GraphStore) -> None:
    """The same student on the same columns, whether they are one array or two."""
    files = [
        [store.write_part(name, part, np.dtype(np.float32), (6,), [store.gather("feat", store.ids(part))[:, columns]])
         for part in range(store.num_parts)]
        for name, columns in (("left", slice(6)), ("right", slice(6, 12)))
    ]  # fmt: skip
    store.publish("left", files[0])
    store.publish("right", files[1])
    student = random_rbm(12)
    assert expert_figures(student, store, ("left", "right")) == expert_figures(student, store, ("feat",))
    assert expert_figures(student, store, ("right", "left")) != expert_figures(student, store, ("feat",))


def test_one_expert_without_labels_or_edges(tmp_path: Path) -> None:
    graph = small_graph(num_nodes=3)
    bare = replace(graph, label=np.full(3, -1), csc=type(graph.csc)(np.zeros(4, np.int64), graph.csc.indices[:0]))
    store = write_graph(str(tmp_path), bare, np.zeros(3, np.int32))
    figures = expert_figures(random_rbm(12, num_experts=1, top_k=1), store, ("feat",))
    json.dumps(figures, allow_nan=False)
    assert figures["class_share"] is None
    assert figures["degree_buckets"] == [{"from": 0, "to": 0, "share": 1.0}]
    for layer in figures["layers"]:
        assert layer["class_nmi"] is None
        assert layer["closest_memories"] is None
        assert layer["load_entropy_bits"] == layer["gate_entropy_bits"] == 0
        assert layer["experts"][0]["purity"] is None
        assert layer["experts"][0]["degree_lift"] == [1.0]
        assert len(layer["experts"][0]["nearest"]) == 3, "as many as there are"


def test_maps_are_principal_components(store: GraphStore) -> None:
    student, graph = random_rbm(12), partly_labelled()
    orig_id = store.gather("orig_id", np.arange(NODES))
    for found, x, layer in zip(
        input_maps(student, store, ("feat",), seed=0), dense_inputs(student), student.routed_layers, strict=True
    ):
        rows = unit(np.concatenate([x[orig_id], layer.memory_ED.numpy()]))
        rows -= rows.mean(0)
        left, values, _ = np.linalg.svd(rows, full_matrices=False)
        expected = left[:, :2] * values[:2]
        at = np.concatenate([found.points_S2, found.memories_E2])
        np.testing.assert_allclose(np.abs(at), np.abs(expected), atol=1e-4)
        np.testing.assert_allclose(found.variance_2, values[:2] ** 2 / (values**2).sum(), rtol=1e-4)
        assert np.array_equal(found.class_S, graph.label[orig_id])


def test_a_map_is_of_a_seeded_sample(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_MAP_ROWS", 50)
    student = random_rbm(12)
    one, same, other = (input_maps(student, store, ("feat",), seed)[0] for seed in (0, 0, 1))
    assert one.points_S2.shape == (50, 2)
    assert len(np.unique(one.points_S2, axis=0)) == 50, "no node twice"
    assert np.array_equal(one.points_S2, same.points_S2)
    assert not np.array_equal(one.class_S, other.class_S)


def test_a_map_of_inputs_of_width_one(tmp_path: Path) -> None:
    graph = small_graph(num_features=5)
    narrow = replace(graph, num_features=1, feat_chunks=lambda: (feat[:, :1] for feat in graph.feat_chunks()))
    store = write_graph(str(tmp_path), narrow, np.zeros(NODES, np.int32))
    found = input_maps(random_rbm(1), store, ("feat",), seed=0)[0]
    assert len(np.unique(found.points_S2[:, 0].round(4))) == 2, "normalised, a number is 1 or −1"
