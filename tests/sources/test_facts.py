"""The size of a source, told without reading it, against the source that is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from torch_geometric.data import Data

from rbm_dist.config.source import DigitsConfig, NpzConfig, OgbConfig, PygConfig, SyntheticConfig, TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import source, tables
from rbm_dist.sources.facts import SourceFacts, source_facts

NODES, EDGES, FEATURES, CLASSES = 5000, 20_000, 6, 4


def columns() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    nodes: dict[str, Any] = {"id": np.arange(NODES) * 3, "label": rng.integers(0, CLASSES, NODES)}
    nodes["split"] = rng.choice(["train", "val", "test"], NODES, p=[0.2, 0.1, 0.7])
    nodes |= {f"x{k}": rng.random(NODES).round(6) for k in range(FEATURES)}
    ends = {name: 3 * rng.integers(0, NODES, EDGES) for name in ("src", "dst")}
    return nodes, ends


def check(facts: SourceFacts, tolerance: float = 0.0) -> None:
    expected = (NODES, 2 * EDGES, FEATURES, CLASSES, 1000, 500)
    found = (
        facts.num_nodes, facts.num_edges, facts.num_features, facts.num_classes, facts.num_train, facts.num_val,
    )  # fmt: skip
    np.testing.assert_allclose(found[2:4], expected[2:4])
    np.testing.assert_allclose(found[:2], expected[:2], rtol=tolerance)
    np.testing.assert_allclose(found[4:], expected[4:], rtol=0.1 + tolerance)


def test_parquet_by_its_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, table in zip(("nodes", "edges"), columns(), strict=True):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    config = TablesConfig(nodes=f"{tmp_path}/nodes.parquet", edges=f"{tmp_path}/edges.parquet")
    opened = tables.open_tables(config, str(tmp_path / "scratch"))
    assert (opened.num_nodes, opened.num_edges) == (NODES, EDGES)
    monkeypatch.setattr(tables, "_derive", None)
    facts = source_facts(config, 0)
    check(facts)
    assert facts.note == "classes and splits are those of the first rows"


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_csv_by_its_size(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbm_dist.sources.table_look._BLOCK", 1 << 16)
    for name, table in zip(("nodes", "edges"), columns(), strict=True):
        with (
            pa.CompressedOutputStream(tmp_path / f"{name}.{suffix}", "gzip")
            if suffix.endswith("gz")
            else open(tmp_path / f"{name}.{suffix}", "wb") as stream
        ):
            pa.csv.write_csv(pa.table(table), stream)
    facts = source_facts(TablesConfig(nodes=f"{tmp_path}/nodes.{suffix}", edges=f"{tmp_path}/edges.{suffix}"), 0)
    check(facts, 0.1)
    assert facts.note.startswith("rows of text are estimated from sizes")


def test_npy_by_its_headers(tmp_path: Path) -> None:
    nodes, ends = columns()
    (tmp_path / "nodes").mkdir()
    codes = np.array([{"train": 0, "val": 1, "test": 2}[each] for each in nodes["split"]], np.int8)
    arrays = {"feat": np.stack([nodes[f"x{k}"] for k in range(FEATURES)], 1), "label": nodes["label"], "split": codes}
    for name, array in arrays.items():
        np.save(tmp_path / "nodes" / f"{name}.npy", array)
    np.save(tmp_path / "edges.npy", np.stack([ends["src"] // 3, ends["dst"] // 3]))
    check(source_facts(TablesConfig(nodes=f"{tmp_path}/nodes", edges=f"{tmp_path}/edges.npy"), 0))


def test_synthetic_by_its_keys() -> None:
    config = SyntheticConfig(num_nodes=10_000, num_communities=47, degree=10)
    facts = SourceFacts(10_000, 100_000, 100, 47, 800, 200, True, 1, 1, 1 << 20, num_test=9000)
    assert source_facts(config, 0) == facts
    assert facts.num_evaluated == 9200


def test_pyg_is_loaded(tmp_path: Path) -> None:
    data = Data(x=torch.rand(60, 5), y=torch.arange(60) % 3, edge_index=torch.randint(0, 60, (2, 200)))
    torch.save(data, tmp_path / "data.pt")
    config = PygConfig(path=str(tmp_path / "data.pt"), train_per_class=2, val_per_class=3)
    facts = SourceFacts(60, 400, 5, 3, 6, 9, True)
    assert source_facts(config, 0) == facts
    assert facts.num_evaluated == 54


def test_small_sources_are_read(data_dir: Path) -> None:
    for config in (DigitsConfig(), NpzConfig(path=str(data_dir / "cora.npz"))):
        graph, facts = source.read(config, 0), source_facts(config, 0)
        assert (facts.num_nodes, facts.num_edges) == (graph.csc.num_nodes, graph.csc.num_edges)
        assert (facts.nonzeros is not None) == graph.sparse_feat
        assert not facts.streamed


def test_ogb_without_its_files_by_its_published_sizes(tmp_path: Path) -> None:
    facts = source_facts(OgbConfig(name="ogbn-papers100M", root=str(tmp_path)), 0)
    assert (facts.num_nodes, facts.num_edges) == (111_059_956, 2 * 1_615_685_872)
    assert facts.note == "published sizes of ogbn-papers100M"
    assert facts.num_evaluated == 125_265 + 214_338
    with pytest.raises(InputError, match=r"source\.name: ogbn-mag"):
        source_facts(OgbConfig(name="ogbn-mag", root=str(tmp_path)), 0)
    (tmp_path / "ogbn_arxiv").mkdir()
    with pytest.raises(InputError, match="missing"):
        source_facts(OgbConfig(name="ogbn-arxiv", root=str(tmp_path)), 0)


def test_files_that_are_not_there() -> None:
    with pytest.raises(InputError, match="no such file"):
        source_facts(TablesConfig(nodes="nowhere/nodes.csv", edges="nowhere/edges.csv"), 0)
