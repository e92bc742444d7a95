"""Predictions against the method's formulas, row by row, with the source's node ids; and as a Parquet file."""

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
from rbm_dist.serve import predictor
from rbm_dist.serve.predictor import Predictions, predict, write_parquet
from rbm_dist.sources import source
from tests.serve.reference import class_probabilities, random_student
from tests.small_graph import small_graph, write_graph

GRAPH = small_graph(num_nodes=90)


@pytest.fixture
def store(tmp_path: Path) -> GraphStore:
    """A small graph whose nodes are scattered over three parts."""
    return write_graph(str(tmp_path / "run"), GRAPH, np.random.default_rng(0).integers(0, 3, 90).astype(np.int32))


def joined(chunks: Iterator[Predictions]) -> Predictions:
    whole = list(chunks)
    names = ("orig_id", "cls", "probability")
    return Predictions(*(np.concatenate([getattr(chunk, name) for chunk in whole]) for name in names))


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
    student, _ = random_student(kind, num_experts=num_experts, top_k=top_k, **options)
    found = joined(predict(student, store))
    assert sorted(found.orig_id.tolist()) == list(range(90))
    expected = class_probabilities(student, next(GRAPH.feat_chunks()))[found.orig_id]
    np.testing.assert_allclose(found.probability, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(found.cls, found.probability.argmax(1))
    assert found.probability.dtype == np.float32


def test_inputs_are_joined_in_their_order(store: GraphStore) -> None:
    pos = np.random.default_rng(1).normal(size=(90, 4)).astype(np.float32)  # by node id
    rows = [pos[store.ids(part)] for part in range(store.num_parts)]
    files = [store.write_part("pos", part, pos.dtype, (4,), [each]) for part, each in enumerate(rows)]
    store.publish("pos", files)
    student, _ = random_student("rbm", num_features=16, inputs=["pos", "feat"])
    found = joined(predict(student, store))  # node by node id
    feat = next(GRAPH.feat_chunks())[found.orig_id]
    expected = class_probabilities(student, np.concatenate([pos, feat], axis=1))
    np.testing.assert_allclose(found.probability, expected, rtol=2e-4, atol=1e-6)


def test_ids_are_the_inputs_where_only_its_largest_component_is_kept(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "citeseer.npz"
    graph = source.read(NpzConfig(path=str(path), largest_component=True), seed=0)
    num_nodes = graph.csc.num_nodes
    part_N = np.random.default_rng(0).integers(0, 3, num_nodes).astype(np.int32)
    student, _ = random_student("mlp", num_features=graph.num_features, num_classes=graph.num_classes)
    found = joined(predict(student, write_graph(str(tmp_path), graph, part_N)))
    with np.load(path, allow_pickle=False) as raw:
        arrays = {key: raw[key] for key in raw.files if key.startswith("a")}
    adj, attr = (
        sp.csr_array(tuple(arrays[f"{kind}_{part}"] for part in ("data", "indices", "indptr")), arrays[f"{kind}_shape"])
        for kind in ("adj", "attr")
    )
    _, component = connected_components(adj, directed=False)
    np.testing.assert_array_equal(np.sort(found.orig_id), np.flatnonzero(component == scipy.stats.mode(component).mode))
    some = np.random.default_rng(1).choice(num_nodes, 40, replace=False)
    feat = attr[found.orig_id[some]].toarray()
    np.testing.assert_allclose(found.probability[some], class_probabilities(student, feat), rtol=2e-4, atol=1e-6)


def test_chunks_of_rows_make_no_difference(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = random_student("rbm")
    whole = joined(predict(student, store))
    monkeypatch.setattr(predictor, "_ROWS", 7)
    chunks = list(predict(student, store))
    assert max(len(chunk.orig_id) for chunk in chunks) == 7
    pieces = joined(iter(chunks))
    np.testing.assert_array_equal(pieces.orig_id, whole.orig_id)
    np.testing.assert_allclose(pieces.probability, whole.probability, rtol=1e-5)


def test_a_parquet_file_has_a_row_per_node(store: GraphStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_ROWS", 16)  # so that there are many row groups
    student, _ = random_student("rbm")
    expected = joined(predict(student, store))
    target = f"{url}/deep/predictions.parquet"
    assert write_parquet(target, predict(student, store), num_classes=5) == 90
    fs, path = storage.filesystem(target)
    with fs.open(path, "rb") as stream:
        table = pq.read_table(stream)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("node_id", "int64"), ("class", "int32"), ("probability", "fixed_size_list<element: float>[5]"),
    ]  # fmt: skip
    np.testing.assert_array_equal(table["node_id"], expected.orig_id)
    np.testing.assert_array_equal(table["class"], expected.cls)
    np.testing.assert_allclose(table["probability"].to_pylist(), expected.probability, rtol=1e-6)


def test_other_formats_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    def chunks() -> Iterator[Predictions]:
        pytest.fail("a prediction was made")
        yield

    with pytest.raises(InputError, match=r"out\.csv: predictions are written as Parquet"):
        write_parquet(f"{tmp_path}/out.csv", chunks(), num_classes=5)


def test_only_predictions_are_written_over(store: GraphStore, url: str) -> None:
    student, _ = random_student("rbm")
    target = f"{url}/nodes.parquet"
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"node_id": [1, 2]}), table)
    for mine in (table.getvalue().to_pybytes(), b"no table"):
        with storage.atomic_writer(target) as stream:
            stream.write(mine)
        before = storage.file_info(target)
        with pytest.raises(InputError, match=rf"^{target}: is there and holds no predictions"):
            write_parquet(target, predict(student, store), num_classes=5)
        assert storage.file_info(target) == before
    storage.remove(target)
    for _ in range(2):
        assert write_parquet(target, predict(student, store), num_classes=5) == 90


def test_nothing_is_left_if_a_prediction_fails(url: str) -> None:
    def chunks() -> Iterator[Predictions]:
        yield Predictions(np.arange(2), np.zeros(2, int), np.full((2, 5), 0.2, np.float32))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_parquet(f"{url}/out.parquet", chunks(), num_classes=5)
    assert storage.listdir(url) == []


def test_a_full_disk_is_one_message(small_disk: Path) -> None:
    rng = np.random.default_rng(0)
    rows = (Predictions(np.arange(9999), np.zeros(9999, int), rng.random((9999, 5), np.float32)) for _ in range(20))
    with pytest.raises(InputError, match=r"out\.parquet: no space left"):
        write_parquet(f"{small_disk}/out.parquet", rows, num_classes=5)
    assert list(small_disk.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "out.parquet").mkdir()
    chunk = Predictions(np.arange(2), np.zeros(2, int), np.full((2, 5), 0.2, np.float32))
    with pytest.raises(InputError, match=r"out\.parquet: cannot be written"):
        write_parquet(f"{tmp_path}/out.parquet", iter([chunk]), num_classes=5)
