"""From a table to shards and predictions: the summary, class names, ids, scaling and unknown nodes, all the way."""

import io
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.report.source_table import source_table
from rbm_dist.serve.experts import expert_figures
from rbm_dist.serve.network import network_of
from rbm_dist.serve.prediction_files import Layout, write
from rbm_dist.serve.predictor import id_type, predict
from rbm_dist.sources.scaling import SCALING, Scaling
from rbm_dist.stages import partition, run
from rbm_dist.stages.pipeline import STAGES
from rbm_dist.stages.source import below, over_here, stage_source
from tests.serve.reference import random_student
from tests.sources.table_input import save

ROWS = 60
IDS = [uuid.UUID(int=index << 64).bytes for index in range(ROWS)]
NAMES = np.array(["owl", "cat", "dog"])[np.arange(ROWS) % 3]


def tables(folder: Path, **columns: Any) -> dict[str, Any]:
    """Configuration of a graph of UUIDs, named classes, one column of Unix times beside one of small numbers."""
    rng = np.random.default_rng(0)
    table = {
        "id": pa.array(IDS, pa.uuid()), "label": NAMES, "t": 1.7e9 + rng.random(ROWS) * 1e7, "x": rng.normal(size=ROWS),
        "note": ["hello"] * ROWS, **columns,
    }  # fmt: skip
    save(f"{folder}/nodes.parquet", table)
    src, dst = rng.integers(0, ROWS, (2, 200))
    ends = {"src": [IDS[each] for each in src], "dst": [IDS[each] for each in dst]}
    ends["dst"][7] = uuid.UUID(int=1).bytes
    save(f"{folder}/edges.parquet", {name: pa.array(each, pa.uuid()) for name, each in ends.items()} | {"w": src})
    return {"kind": "tables", "nodes": f"{folder}/nodes.parquet", "edges": f"{folder}/edges.parquet"}


def written(folder: Path, **source: Any) -> tuple[GraphStore, dict[str, Any]]:
    config = Config.model_validate({"run_dir": "x", "source": {"train_per_class": 3, "val_per_class": 3, **source}})
    files = stage_source(config, f"{folder}/source", over_here)
    partition.write_graph(config, f"{folder}/source", below(files, "source"), f"{folder}/graph", over_here)
    return GraphStore.open(f"{folder}/graph", verify=True), storage.read_json(f"{folder}/source/source.json")


def test_names_and_ids_go_all_the_way(tmp_path: Path) -> None:
    store, facts = written(tmp_path, **tables(tmp_path), unknown_nodes="drop")
    assert store.class_names == facts["class_names"] == ["cat", "dog", "owl"]
    student, built = random_student("rbm", num_features=2, num_classes=3)
    network = network_of(built, {name: tensor.numpy() for name, tensor in student.state_dict().items()})
    out = f"{tmp_path}/p.parquet"
    layout = Layout(store.num_classes, tuple(store.class_names))
    write(out, "parquet", predict(network, ("feat",), store), layout, id_type(store))
    found = pq.read_table(out)
    assert found.schema.field("node_id").type == pa.uuid()
    ids = [each.bytes for each in found["node_id"].to_pylist()]
    assert sorted(ids) == sorted(IDS)
    assert found["class_name"].to_pylist() == [store.class_names[each] for each in found["class"].to_pylist()]
    by_id = dict(zip(IDS, NAMES, strict=True))
    label = store.gather("label", np.arange(store.num_nodes))
    assert [store.class_names[each] for each in label] == [by_id[each] for each in ids]
    figures = expert_figures(student, store, ("feat",))
    assert figures["class_names"] == store.class_names
    assert {node["node_id"] for node in figures["layers"][0]["experts"][0]["nearest"]} <= {
        str(uuid.UUID(bytes=each)) for each in IDS
    }


def test_the_summary_says_how_the_input_was_understood(tmp_path: Path) -> None:
    _, facts = written(tmp_path, **tables(tmp_path), unknown_nodes="drop")
    assert facts["dropped_unknown"] == 1
    summary = facts["summary"]
    assert summary["edges"]["read"] == 200
    assert summary["label"]["classes"] == [{"name": name, "nodes": 20} for name in ("cat", "dog", "owl")]
    shown = text_of(summary)
    for said in (
        "column id, binary, such as", "cat (20), dog (20), owl (20)",
        "drawn, 3 + 3 of each class: train 9, val 9, test 42",
        "t (double): 1.7e+09 to 1.71e+09", "200 read", "1 to unknown nodes dropped",
        "w (of the edge list", "note (string, which is no number)", "! column t ranges from 1.7e+09",
    ):  # fmt: skip
        assert said in shown, said


def text_of(summary: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as printed:
        console.print(source_table(summary))
    return printed.get()


def test_features_are_scaled_by_what_training_sees(tmp_path: Path) -> None:
    settings = {"unknown_nodes": "drop", "unseen_share": 0.5, "normalize": "column"}
    store, _ = written(tmp_path, **tables(tmp_path), **settings)
    ids = np.arange(store.num_nodes)
    seen = store.gather("split", ids) != UNSEEN
    assert 0 < (~seen).sum() < len(ids)
    feat = store.gather("feat", ids).astype(np.float64)
    np.testing.assert_allclose(feat[seen].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(feat[seen].std(axis=0), 1, rtol=1e-3)
    kept = Scaling.from_arrays({name: np.load(f"{tmp_path}/graph/{name}.npy") for name in SCALING})
    raw = pq.read_table(f"{tmp_path}/nodes.parquet", columns=["t", "x"]).to_pandas().to_numpy(np.float32)
    rows = store.gather("orig_id", ids)  # of the node table
    np.testing.assert_allclose(kept.apply(raw)[rows], feat, rtol=1e-5, atol=1e-6)


def test_missing_values_and_added_nodes(tmp_path: Path) -> None:
    column = [None if index % 5 == 0 else float(index) for index in range(ROWS)]
    config = tables(tmp_path, y=column)
    store, facts = written(
        tmp_path, **config, unknown_nodes="add", missing="mean", missing_indicator=True, normalize="none"
    )
    assert store.num_nodes == ROWS + 1
    assert facts["feature_names"] == ["t", "x", "y", "t is missing", "x is missing", "y is missing"]
    feat = store.gather("feat", np.arange(store.num_nodes))
    added = store.gather("label", np.arange(store.num_nodes)) < 0
    assert added.sum() == 1
    np.testing.assert_array_equal(feat[added][0, 3:], [1, 1, 1])
    np.testing.assert_allclose(feat[added][0, 2], np.mean([each for each in column if each is not None]))
    assert feat[:, 5].sum() == 12 + 1


def test_all_that_the_stages_write_is_theirs_to_clear(tmp_path: Path) -> None:
    url = str(tmp_path)
    written(tmp_path, **tables(tmp_path), unknown_nodes="drop")
    for stage in STAGES[:2]:
        run.clear(stage, url)
        left = {path.name for path in (tmp_path / stage.folder).glob("*")}
        assert not left
