"""Scale does not matter: a factor on all features, or another unit of one, changes neither teacher nor student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rbm_dist.config.run import Config
from rbm_dist.graph.store import GraphStore
from rbm_dist.stages import local
from tests.sources.table_input import save

ROWS, CLASSES = 240, 3


def planted(sparse: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of a node table and of an edge list: three classes, told apart by features and by neighbours."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, ROWS)
    feat = rng.normal(size=(CLASSES, 8))[label] + rng.normal(size=(ROWS, 8))
    if sparse:  # counts of words, some of which are a class's own
        feat = rng.poisson(np.where(np.arange(8) % CLASSES == label[:, None], 1.0, 0.1)).astype(float)
    src = np.repeat(np.arange(ROWS), 4)
    dst = np.array([rng.choice(np.flatnonzero(label == label[node])) for node in src])
    return {"id": np.arange(ROWS), "label": label} | {f"f{k}": feat[:, k] for k in range(8)}, {"src": src, "dst": dst}


def trained(folder: Path, nodes: dict[str, Any], edges: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """Test accuracies of teacher and student, and the soft labels by node of the table."""
    save(f"{folder}/nodes.parquet", nodes)
    save(f"{folder}/edges.parquet", edges)
    config = Config.model_validate(
        {
            "run_dir": "x",
            "source": {"kind": "tables", "nodes": f"{folder}/nodes.parquet", "edges": f"{folder}/edges.parquet"},
            "partition": {"num_parts": 1, "method": "random"},
            "teacher": {"hidden": 16, "fanout": [-1, -1], "epochs": 30, "dropout": 0.0},
            "soft_labels": {"inference": "exact"},
            "student": {"models": ["mlp"], "hidden": 16, "epochs": 20, "dropout": 0.0},
        }
    )
    torch.set_num_threads(1)
    teacher = local.prepare(config, f"{folder}/prepared")
    student = local.train(config, f"{folder}/prepared", f"{folder}/student")
    store = GraphStore.open(f"{folder}/prepared/graph")
    ids = np.arange(ROWS)
    soft = np.empty((ROWS, CLASSES), np.float32)
    soft[store.gather("orig_id", ids)] = store.gather("soft", ids)
    return {"teacher": teacher["test"], "student": student["test"]}, soft


def scaled(nodes: dict[str, Any], factor: float) -> dict[str, Any]:
    return {name: column * factor if name.startswith("f") else column for name, column in nodes.items()}


@pytest.mark.parametrize("sparse", [False, True])
def test_a_factor_on_all_features_changes_nothing(tmp_path: Path, sparse: bool) -> None:
    nodes, edges = planted(sparse)
    expected, soft = trained(tmp_path / "plain", nodes, edges)
    assert expected["teacher"] > 0.8
    for factor in (2.0**-7, 0.01, 100.0):
        found, other = trained(tmp_path / str(factor), scaled(nodes, factor), edges)
        tolerance = 1e-4 if factor < 0.01 else 0.05  # a power of two scales without rounding
        np.testing.assert_allclose(other, soft, atol=tolerance)
        for model in expected:
            assert abs(found[model] - expected[model]) <= 0.01, (factor, model)


@pytest.mark.parametrize("wild", ["Unix times", "1e30"])
def test_one_column_of_another_unit_does_no_harm(tmp_path: Path, wild: str) -> None:
    nodes, edges = planted(sparse=False)
    noise = np.random.default_rng(1).random(ROWS)
    if wild == "Unix times":
        nodes["f3"] = noise
    expected, _ = trained(tmp_path / "plain", nodes, edges)
    nodes["f3"] = 1.7e9 + 1e6 * noise if wild == "Unix times" else nodes["f3"] * 1e30
    found, _ = trained(tmp_path / "wild", nodes, edges)
    for model in expected:
        assert found[model] >= expected[model] - 0.05, model
