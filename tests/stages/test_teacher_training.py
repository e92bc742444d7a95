"""The teacher's training in one process: batches made ahead, its calibration, and where it stops."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rbm_dist.config.run import Config, StudentConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.feature_hops import add_hops
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.splits import TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.teacher import build_teacher
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.report.metrics import Row
from rbm_dist.serve.artifact import load_weights
from rbm_dist.stages.local import MetricsRecorder
from rbm_dist.stages.student import train_students
from rbm_dist.stages.teacher import train_teacher
from rbm_dist.train import teacher
from rbm_dist.train.sampled_rows import sample_logits
from rbm_dist.train.teacher import _PENALTY as PENALTY
from tests.curves import computed
from tests.gloo import run_ranks
from tests.small_graph import small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return small_store(str(tmp_path_factory.mktemp("teacher")))


def config(**teacher: Any) -> Config:
    settings = {
        "hidden": 16, "fanout": [-1, -1], "epochs": 40, "batch_size": 40, "lr": 0.05, "dropout": 0.3,
        "weight_decay": 5e-4,
    }  # fmt: skip
    return Config.model_validate(
        {"run_dir": "x", "teacher": settings | teacher, "cluster": {"checkpoint_every": 5}, "seed": 1}
    )


def train(store: GraphStore, url: Path, cut: int | None = None, **teacher: Any) -> list[Row]:
    """The rows of the epochs trained; `cut` fails after one epoch, as a killed process would."""

    class Cutter(MetricsRecorder):
        def metrics(self, loop: str, row: Row) -> None:
            super().metrics(loop, row)
            if row["epoch"] == cut:
                raise RuntimeError("cut off")

    recorder = Cutter()
    train_teacher(Mesh.single(), recorder, config(**teacher), store.url, str(url))
    return recorder.loops.get("teacher", [])


def val_logits(store: GraphStore, url: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model = build_teacher(config(), store.num_features, store.num_classes)
    load_weights(f"{url}/model.safetensors", model)
    val = np.flatnonzero(store.gather("split", np.arange(store.num_nodes)) == VAL)
    with torch.no_grad():
        logits = sample_logits(model.eval(), store, val, (-1, -1), 0, training=False)
    return logits.double(), torch.from_numpy(store.gather("label", val))


def test_batches_made_ahead_change_nothing_and_one_thread_reads_the_store(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[threading.Thread] = []

    def reading(name: str) -> None:
        method = getattr(GraphStore, name)

        def call(self: GraphStore, *arguments: Any) -> Any:
            readers.append(threading.current_thread())
            return method(self, *arguments)

        monkeypatch.setattr(GraphStore, name, call)

    reading("sample")
    reading("gather")
    settings = {"fanout": [3, 2], "epochs": 4, "batch_size": 30, "calibrate": True}
    ahead = train(store, tmp_path / "ahead", **settings)
    of_phase = list(dict.fromkeys(readers))
    assert threading.current_thread() not in of_phase
    assert len(of_phase) == 2 * 4 + 1, "training and validation of every epoch, and calibration"
    assert readers == sorted(readers, key=of_phase.index), "one after the other"
    monkeypatch.setattr(teacher, "Prefetch", functools.partial(Prefetch, depth=0))
    readers.clear()
    inline = train(store, tmp_path / "inline", **settings)
    assert set(readers) == {threading.current_thread()}
    for row, expected in zip(ahead, inline, strict=True):
        assert computed(row) == computed(expected)
        assert 0 <= row["wait_s"] < 60
    found, expected = (load_file(tmp_path / each / "model.safetensors") for each in ("ahead", "inline"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_fails_while_reading_ahead_ends_the_training(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, calls = GraphStore.sample, []

    def failing(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 9:
            raise InputError("part-00002: damaged")
        return sample(*arguments)

    monkeypatch.setattr(GraphStore, "sample", failing)
    with pytest.raises(InputError, match="part-00002: damaged"):
        train(store, tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def on_ranks(rank: int, world: int, graph_url: str, url: str, norms: list[str]) -> dict[str, list[Row]]:
    mesh = Mesh.init(1, torch.device("cpu")) if world > 1 else Mesh.single()
    curves = {}
    for norm in norms:
        recorder = MetricsRecorder()
        others = {"gat": {"conv": "gat", "norm": "layer"}, "sign": {"model": "sign", "hops": 2}}
        settings = config(**others.get(norm, {"norm": norm}), fanout=[4, 3], epochs=3)
        train_teacher(mesh, recorder, settings, graph_url, f"{url}/{norm}")
        curves[norm] = recorder.loops.get("teacher", [])
    return curves


def test_the_curve_and_the_weights_do_not_depend_on_the_number_of_ranks(store: GraphStore, tmp_path: Path) -> None:
    add_hops(store, 2)
    norms = ["none", "layer", "gat", "sign"]
    reference = on_ranks(0, 1, store.url, f"{tmp_path}/1", norms)
    losses = {norm: [row["loss"] for row in rows] for norm, rows in reference.items()}
    assert all(len({losses[norm][epoch] for norm in norms}) == 4 for epoch in range(3)), "they differ"
    for world in (3, 5):  # there are four parts: of five ranks one has no rows
        found = run_ranks(on_ranks, world, world, store.url, f"{tmp_path}/{world}", norms)[0]
        for norm in norms:
            for name in ("loss", "val_loss", "val_accuracy"):
                curves = [[row[name] for row in rows[norm]] for rows in (found, reference)]
                np.testing.assert_allclose(*curves, rtol=1e-4, err_msg=f"{norm}, {world} ranks: {name}")
            weights, expected = (load_file(tmp_path / n / norm / "model.safetensors") for n in (str(world), "1"))
            for name, tensor in expected.items():
                torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{norm}: {name}")


def test_by_default_weights_decay_less_where_more_nodes_are_trained_on(store: GraphStore, tmp_path: Path) -> None:
    num_train = int(np.sum(store.gather("split", np.arange(store.num_nodes)) == TRAIN))
    rows = [
        train(store, tmp_path / name, epochs=3, weight_decay=decay)
        for name, decay in (("default", None), ("same", PENALTY / num_train), ("other", 2 * PENALTY / num_train))
    ]
    losses = [[row["loss"] for row in each] for each in rows]
    assert losses[0] == losses[1] != losses[2]


def test_calibration_is_the_best_temperature_on_validation(store: GraphStore, tmp_path: Path) -> None:
    rows = train(store, tmp_path / "plain", select="accuracy")
    train(store, tmp_path / "calibrated", select="accuracy", calibrate=True)
    plain, label = val_logits(store, tmp_path / "plain")
    found = load_file(tmp_path / "calibrated" / "model.safetensors")["temperature"].item()
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 4001))
    losses = [F.cross_entropy(plain / temperature, label).item() for temperature in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=5e-3)
    assert abs(found - 1) > 0.05, "there was something to calibrate"
    calibrated, _ = val_logits(store, tmp_path / "calibrated")
    torch.testing.assert_close(calibrated, plain / found, rtol=1e-4, atol=1e-5)
    assert F.cross_entropy(calibrated, label).item() == pytest.approx(min(losses), rel=1e-5)
    # The epoch kept is the one with the best accuracy, and calibration leaves its choices as they are.
    assert (plain.argmax(1) == label).double().mean().item() == max(row["val_accuracy"] for row in rows)


@pytest.mark.parametrize("select", ["loss", "accuracy"])
def test_patience_stops_and_a_resumed_training_stops_at_the_same_epoch(
    store: GraphStore, tmp_path: Path, select: str
) -> None:
    settings = {"patience": 6, "select": select}
    rows = train(store, tmp_path / "whole", **settings)
    scores = [-row["val_loss"] if select == "loss" else row["val_accuracy"] - 1e-9 * row["val_loss"] for row in rows]
    assert 6 < len(rows) < 40
    assert len(rows) == int(np.argmax(scores)) + 1 + 6
    for cut in (len(rows) - 2, len(rows) - 6):
        url = tmp_path / f"cut-{cut}"
        with pytest.raises(RuntimeError, match="cut off"):
            train(store, url, cut, **settings)
        again = train(store, url, **settings)
        assert again[0]["epoch"] == cut // 5 * 5 + 5 * ((cut + 1) % 5 == 0), "it goes on from the last checkpoint"
        assert [row["epoch"] for row in again] == list(range(again[0]["epoch"], len(rows)))
        assert again[-1]["val_loss"] == rows[-1]["val_loss"]
        weights, expected = (load_file(folder / "model.safetensors") for folder in (url, tmp_path / "whole"))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert train(store, tmp_path / "whole", **settings) == [], "what has stopped goes no further"


def test_a_loss_that_is_not_finite_ends_with_advice(store: GraphStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^teacher: not finite in epoch \d+: .*try a smaller teacher.lr than 1e\+30"):
        train(store, tmp_path / "teacher", lr=1e30)
    with pytest.raises(InputError, match=r"^student mlp: not finite in epoch \d+: .*try a smaller student.lr than 1e"):
        train_mlp(store, tmp_path / "student", lr=1e30)


def test_validation_that_is_not_finite_ends_with_advice(tmp_path: Path) -> None:
    """Training never reads these features: its loss is finite, and no weights would ever be the best."""
    store = small_store(str(tmp_path))
    for part in range(store.num_parts):
        path = f"{store.url}/part-{part:05d}/feat.npy"
        feat = np.load(path)
        feat[store.array("split", part) == VAL] = 3e38
        np.save(path, feat)
    store = GraphStore.open(store.url)
    wanted = "not finite in epoch 0: val_loss, score; the features, .* look at the source's summary for columns"
    with pytest.raises(InputError, match=f"^teacher: {wanted}"):
        train(store, tmp_path / "teacher", fanout=[0, 0])
    with pytest.raises(InputError, match=f"^student mlp: {wanted}"):
        train_mlp(store, tmp_path / "student", hold_out_validation=True)
    assert not list(tmp_path.rglob("model.safetensors"))


def train_mlp(store: GraphStore, url: Path, **student: Any) -> None:
    mlp = {"models": ["mlp"], "hidden": 8, "epochs": 5, "norm": "none"} | student
    settings = config().model_copy(update={"student": StudentConfig.model_validate(mlp)})
    train_students(Mesh.single(), MetricsRecorder(), settings, store.url, str(url))
