"""Predictions for a graph against the method's formulas, row by row, with the source's node ids; and their files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import scipy.stats
from scipy.sparse.csgraph import connected_components

from rbm_dist import storage
from rbm_dist.config.source import NpzConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.serve import predictor
from rbm_dist.serve.network import network_of
from rbm_dist.serve.prediction_files import Layout, Predictions, write
from rbm_dist.serve.predictor import predict
from rbm_dist.sources import source
from tests.serve.reference import class_probabilities, random_student
from tests.small_graph import small_graph, write_graph

GRAPH = small_graph(num_nodes=90)


@pytest.fixture
def store(tmp_path: Path) -> GraphStore:
    """A small graph whose nodes are scattered over three parts."""
    return write_graph(str(tmp_path / "run"), GRAPH, np.random.default_rng(0).integers(0, 3, 90).astype(np.int32))


def predicted(student: Student, facts: dict, store: GraphStore) -> Iterator[Predictions]:
    tensors = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    return predict(network_of(facts, tensors, few=1), tuple(facts["inputs"]), store)


def joined(chunks: Iterator[Predictions]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities."""
    whole = list(chunks)
    ids = pa.concat_arrays([chunk.node_id for chunk in whole]).to_numpy()
    return ids, np.concatenate([chunk.probability_nC for chunk in whole])


def write_parquet(url: str, chunks: Iterator[Predictions]) -> int:
    return write(url, "parquet", chunks, Layout(num_classes=5), pa.int64())


@pytest.mark.parametrize(
    ("kind", "num_experts", "top_k", "options"),
    [
        ("mlp", 1, 1, {}), ("rbm", 6, 2, {}), ("rbm", 12, 1, {}), ("rbm", 4, 4, {}), ("rbm", 1, 1, {}),
        ("rbm", 6, 2, {"input_attention": True}), ("rbm", 6, 2, {"routing_temperature": 0.1}),
        ("rbm", 6, 2, {"routing": "input"}), ("rbm", 12, 1, {"routing": "input"}),
        ("rbm", 12, 1, {"input_attention": True}), ("rbm", 12, 2, {"routing_temperature": 0.1}),
    ],
)  # fmt: skip
def test_predictions_are_those_of_the_formulas(
    store: GraphStore, kind: str, num_experts: int, top_k: int, options: dict
) -> None:
    student, facts = random_student(kind, num_experts=num_experts, top_k=top_k, **options)
    ids, probability = joined(predicted(student, facts, store))
    assert sorted(ids.tolist()) == list(range(90))
    expected = class_probabilities(student, next(GRAPH.feat_chunks()))[ids]
    np.testing.assert_allclose(probability, expected, rtol=2e-4, atol=1e-6)
    assert probability.dtype == np.float32


def test_inputs_are_joined_in_their_order(store: GraphStore) -> None:
    pos = np.random.default_rng(1).normal(size=(90, 4)).astype(np.float32)  # by node id
    rows = [pos[store.ids(part)] for part in range(store.num_parts)]
    files = [store.write_part("pos", part, pos.dtype, (4,), [each]) for part, each in enumerate(rows)]
    store.publish("pos", files)
    student, facts = random_student("rbm", num_features=16, inputs=["pos", "feat"])
    ids, probability = joined(predicted(student, facts, store))  # node by node id
    feat = next(GRAPH.feat_chunks())[ids]
    expected = class_probabilities(student, np.concatenate([pos, feat], axis=1))
    np.testing.assert_allclose(probability, expected, rtol=2e-4, atol=1e-6)


def test_ids_are_the_inputs_where_only_its_largest_component_is_kept(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "citeseer.npz"
    graph = source.read(NpzConfig(path=str(path), largest_component=True), seed=0)
    num_nodes = graph.csc.num_nodes
    part_N = np.random.default_rng(0).integers(0, 3, num_nodes).astype(np.int32)
    student, facts = random_student("mlp", num_features=graph.num_features, num_classes=graph.num_classes)
    ids, probability = joined(predicted(student, facts, write_graph(str(tmp_path), graph, part_N)))
    with np.load(path, allow_pickle=False) as raw:
        arrays = {key: raw[key] for key in raw.files if key.startswith("a")}
    adj, attr = (
        sp.csr_array(tuple(arrays[f"{kind}_{part}"] for part in ("data", "indices", "indptr")), arrays[f"{kind}_shape"])
        for kind in ("adj", "attr")
    )
    _, component = connected_components(adj, directed=False)
    np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(component == scipy.stats.mode(component).mode))
    some = np.random.default_rng(1).choice(num_nodes, 40, replace=False)
    feat = attr[ids[some]].toarray()
    np.testing.assert_allclose(probability[some], class_probabilities(student, feat), rtol=2e-4, atol=1e-6)


def test_chunks_of_rows_make_no_difference(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    student, facts = random_student("rbm")
    ids, probability = joined(predicted(student, facts, store))
    monkeypatch.setattr(predictor, "_ROWS", 7)
    chunks = list(predicted(student, facts, store))
    assert max(len(chunk.node_id) for chunk in chunks) == 7
    again = joined(iter(chunks))
    np.testing.assert_array_equal(again[0], ids)
    np.testing.assert_allclose(again[1], probability, rtol=1e-5)


def test_a_parquet_file_has_a_row_per_node(store: GraphStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_ROWS", 16)  # so that there are many row groups
    student, facts = random_student("rbm")
    ids, probability = joined(predicted(student, facts, store))
    target = f"{url}/deep/predictions.parquet"
    assert write_parquet(target, predicted(student, facts, store)) == 90
    fs, path = storage.filesystem(target)
    with fs.open(path, "rb") as stream:
        table = pq.read_table(stream)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("node_id", "int64"), ("class", "int32"), ("probability", "fixed_size_list<element: float>[5]"),
    ]  # fmt: skip
    np.testing.assert_array_equal(table["node_id"], ids)
    np.testing.assert_array_equal(table["class"], probability.argmax(1))
    np.testing.assert_allclose(table["probability"].to_pylist(), probability, rtol=1e-6)


def test_nothing_is_left_if_a_prediction_fails(url: str) -> None:
    def chunks() -> Iterator[Predictions]:
        yield Predictions(pa.array([0, 1]), np.full((2, 5), 0.2, np.float32))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_parquet(f"{url}/out.parquet", chunks())
    assert storage.listdir(url) == []


def test_a_full_disk_is_one_message(small_disk: Path) -> None:
    rng = np.random.default_rng(0)
    rows = (Predictions(pa.array(range(9999)), rng.random((9999, 5), np.float32)) for _ in range(20))
    with pytest.raises(InputError, match=r"out\.parquet: no space left"):
        write_parquet(f"{small_disk}/out.parquet", rows)
    assert list(small_disk.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "out.parquet").mkdir()
    chunk = Predictions(pa.array([0, 1]), np.full((2, 5), 0.2, np.float32))
    with pytest.raises(InputError, match=r"out\.parquet: cannot be written"):
        write_parquet(f"{tmp_path}/out.parquet", iter([chunk]))
