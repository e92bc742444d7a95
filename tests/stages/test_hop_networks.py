"""A hop-precomputed teacher in a run, in this process: trained, asked for every node, and nothing left behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rbm_dist.config.run import Config
from rbm_dist.graph.feature_hops import add_hops, hop_names
from rbm_dist.graph.splits import TEST
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.hop_networks import HopNetwork
from rbm_dist.models.teacher import build_teacher
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.serve.artifact import load_weights
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from rbm_dist.stages.teacher import train_teacher
from tests.small_graph import small_store


def config(url: str, **teacher: Any) -> Config:
    settings = {"model": "sign", "hops": 2, "hidden": 16, "epochs": 30, "batch_size": 40, "lr": 0.02} | teacher
    soft = {"hidden": settings["model"] != "sgc"}
    return Config.model_validate({"run_dir": url, "teacher": settings, "soft_labels": soft, "seed": 1})


@pytest.mark.parametrize(
    "settings", [{}, {"norm": "layer", "calibrate": True}, {"model": "sagn"}, {"model": "sgc", "epochs": 60}]
)
def test_soft_labels_are_the_network_on_rows_over_hops(tmp_path: Path, settings: dict[str, Any]) -> None:
    store = small_store(str(tmp_path))
    reset_soft_labels(str(tmp_path))
    chosen = config(str(tmp_path), **settings)
    add_hops(store, 2)
    rows = np.concatenate([store.gather(name, np.arange(240)) for name in ("feat", *hop_names(2))], axis=1)
    train_teacher(Mesh.single(), MetricsRecorder(), chosen, store.url, f"{tmp_path}/teacher")
    model = build_teacher(chosen, store.num_features, store.num_classes)
    assert isinstance(model, HopNetwork)
    load_weights(f"{tmp_path}/teacher/model.safetensors", model)
    assert (model.temperature != 1) == bool(settings.get("calibrate"))
    with torch.no_grad():
        logits, hidden = model.eval().forward_hidden(torch.from_numpy(rows))

    names = write_soft_labels(Run(chosen, str(tmp_path), MetricsRecorder()), over_parts_here)
    wanted = {"soft": logits.softmax(1)} | ({"hidden": hidden} if chosen.soft_labels.hidden else {})
    assert {Path(name).stem for name in names} == wanted.keys()
    written, ids = GraphStore.open(store.url), np.arange(240)
    for name, expected in wanted.items():
        np.testing.assert_allclose(written.gather(name, ids), expected, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.rglob("hop*")), "gone once they were read"
    label, split = (written.gather(name, ids) for name in ("label", "split"))
    accuracy = (written.gather("soft", ids).argmax(1) == label)[split == TEST].mean()
    features_alone = 0.6  # a regression's; neighbours mostly have a node's class
    assert accuracy > features_alone


def test_what_needs_a_gnn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"soft_labels\.entropy_change: needs teacher\.model: gnn"):
        Config.model_validate(
            {"run_dir": str(tmp_path), "teacher": {"model": "sign"}, "soft_labels": {"entropy_change": True}}
        )
    with pytest.raises(ValueError, match=r"soft_labels\.hidden: teacher\.model: sgc is a linear map"):
        Config.model_validate({"run_dir": str(tmp_path), "teacher": {"model": "sgc"}, "soft_labels": {"hidden": True}})
