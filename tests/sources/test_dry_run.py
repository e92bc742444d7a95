"""A look at sources of every kind: what it says is what reading gives, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from rbm_dist.config.source import DigitsConfig, NpzConfig, PygConfig, SyntheticConfig
from rbm_dist.sources import pyg
from rbm_dist.sources.dry_run import dry_run
from rbm_dist.sources.source import open_streamed, read
from tests.patience import patient
from tests.sources.table_input import save


@pytest.mark.parametrize("name", ["digits", "cora"])
def test_sources_that_are_read_as_a_whole(name: str, data_dir: Path) -> None:
    config = DigitsConfig() if name == "digits" else NpzConfig(path=f"{data_dir}/cora.npz")
    graph, (summary, _) = read(config, seed=0), dry_run(config, 0)
    assert summary["nodes"]["rows"] == graph.csc.num_nodes
    assert [each["nodes"] for each in summary["label"]["classes"]] == np.bincount(graph.label).tolist()
    assert summary["edges"]["kept"] == graph.csc.num_edges
    assert len(summary["features"]) == graph.num_features


def test_all_of_a_pyg_graph_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyg, "PIECE_ROWS", 4)
    nodes = torch.arange(10)
    torch.save(Data(x=nodes[:, None] / 8, y=nodes % 2, edge_index=torch.stack([nodes, nodes])), tmp_path / "data.pt")
    summary, note = dry_run(PygConfig(path=f"{tmp_path}/data.pt"), 0)
    assert [(each["min"], each["max"]) for each in summary["features"]] == [(0, 9 / 8)]
    assert summary["edges"]["read"] == 10
    assert note == "All of it was read."


def test_of_a_source_of_any_size_its_own_figures_are_told() -> None:
    config = SyntheticConfig(num_nodes=3000, num_features=12, num_classes=4, num_communities=8)
    summary, _ = dry_run(config, 0)
    opened = open_streamed(config, 0, "unused")
    assert summary["nodes"]["rows"] == opened.num_nodes
    assert (len(summary["features"]), len(summary["label"]["classes"])) == (opened.num_features, opened.num_classes)


def test_the_command_writes_nothing(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.csv", {"id": ["007", "08"], "label": ["a", "b"], "x": [1, 2], "note": ["p", "q"]})
    save(f"{tmp_path}/edges.csv", {"src": ["007"], "dst": ["08"]})
    (tmp_path / "run.yaml").write_text("run_dir: run\nsource: {kind: tables, nodes: nodes.csv, edges: edges.csv}\n")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "rbm_dist", "source", "run.yaml", "--dry-run"], cwd=tmp_path, capture_output=True,
        text=True, timeout=patient(60), check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in ("text, such as '007'", "2 classes: a (1), b (1)", "note (text, such as 'p')"):
        assert said in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
