"""The teacher's arrays against the dense formulas in float64; without Ray, one part after the other."""

import contextlib
import errno
import functools
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.soft_rows import decode, encode
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.gnn import Gnn
from rbm_dist.models.teacher import build_teacher
from rbm_dist.randomness.bits import key
from rbm_dist.serve.artifact import save_weights
from rbm_dist.sources.source import SourceGraph
from rbm_dist.stages import soft_labels
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import MakeWorker, reset_soft_labels, write_soft_labels
from rbm_dist.train.sampled_rows import add_noise
from tests.small_graph import small_graph, with_sparse_features, write_graph

NAMES = ("soft", "hidden", "entropy_change")
GRAPHS = {"dense": small_graph(), "sparse": with_sparse_features(small_graph()), "int8": small_graph()}
_NOISE = 8  # the word of the noise's key


def prepare(
    url: Path,
    graph: SourceGraph,
    num_parts: int,
    layers: int,
    features: str = "float32",
    norm: str = "none",
    **soft_labels: Any,
) -> tuple[Run, Gnn]:
    """A graph and a teacher whose weights are no longer small; node ids are the input's, however it is cut."""
    part_N = np.arange(graph.csc.num_nodes) * num_parts // graph.csc.num_nodes
    store = write_graph(str(url), graph, part_N.astype(np.int32), features)
    config = Config.model_validate(
        {
            "run_dir": str(url),
            "teacher": {"hidden": 16 if graph.num_features < 20 else 6, "fanout": [-1] * layers, "norm": norm},
            "soft_labels": {"batch_size": 50, "hidden": True, "entropy_change": True} | soft_labels,
        }
    )
    teacher = build_teacher(config, store.num_features, store.num_classes)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter *= 1.5
        teacher.temperature.fill_(0.6)
    save_weights(f"{url}/teacher/model.safetensors", teacher)
    return Run(config, str(url), MetricsRecorder()), teacher.double()


def written(run: Run) -> dict[str, np.ndarray]:
    write_soft_labels(run, over_parts_here)
    store = GraphStore.open(run.graph_url)
    return {name: store.gather(name, np.arange(store.num_nodes)) for name in NAMES}


def dense_states(graph: SourceGraph, teacher: Gnn, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities and last hidden states of all nodes."""
    csc = graph.csc
    mean = sp.csr_array((np.ones(csc.num_edges), csc.indices, csc.indptr), shape=(csc.num_nodes, csc.num_nodes))
    mean = sp.diags_array(1 / np.maximum(np.diff(csc.indptr), 1)) @ mean
    hidden = x
    for layer, conv in enumerate(teacher.convs):
        hidden = np.maximum(normalised(teacher.norms[layer - 1], x), 0) if layer else x
        weights = (each.detach().numpy() for each in (conv.lin_l.weight, conv.lin_l.bias, conv.lin_r.weight))
        neighbour, bias, own = weights
        x = (mean @ hidden) @ neighbour.T + bias + hidden @ own.T
    exp = np.exp(x / 0.6)
    return exp / exp.sum(1, keepdims=True), hidden


def normalised(norm: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    state = {name: tensor.detach().numpy() for name, tensor in norm.state_dict().items()}
    if not state:
        return x
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * state["weight"] + state[
        "bias"
    ]


@pytest.mark.parametrize(("layers", "norm"), [(2, "none"), (3, "none"), (3, "layer")])
@pytest.mark.parametrize("features", ["dense", "sparse", "int8"])
def test_arrays_are_the_dense_formulas(tmp_path: Path, features: str, layers: int, norm: str) -> None:
    graph = GRAPHS[features]
    dtype = "int8" if features == "int8" else "float32"
    run, teacher = prepare(tmp_path / "exact", graph, 3, layers, dtype, norm, inference="exact")
    feat = np.concatenate([x.toarray() if sp.issparse(x) else x for x in graph.feat_chunks()])
    if features == "int8":
        step = np.abs(feat).max(axis=0) / 127
        feat = np.rint(feat / step) * step
    noisy = add_noise(torch.from_numpy(feat), np.arange(240), key(run.config.seed, _NOISE)).double().numpy()
    assert np.std(noisy - feat) == pytest.approx(1, abs=0.05)
    soft, hidden = dense_states(graph, teacher, feat.astype(np.float64))
    noisy_soft, _ = dense_states(graph, teacher, noisy)
    change = np.abs(scipy.stats.entropy(noisy_soft, axis=1) - scipy.stats.entropy(soft, axis=1))
    assert np.ptp(change) > 0.1
    exact = written(run)
    sampled = written(prepare(tmp_path / "sampled", graph, 3, layers, dtype, norm, inference="sampled")[0])
    for found in (exact, sampled):
        for name, expected in zip(NAMES, (soft, hidden, change), strict=True):
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("inference", ["exact", "sampled"])
def test_parts_change_nothing_and_nothing_else_is_left(tmp_path: Path, inference: str) -> None:
    arrays = {}
    for num_parts in (1, 4):
        run, _ = prepare(tmp_path / str(num_parts), GRAPHS["dense"], num_parts, 3, inference=inference)
        before = files(tmp_path / str(num_parts))
        arrays[num_parts] = written(run)
        added = files(tmp_path / str(num_parts)) - before
        assert added == {f"{name}.json" for name in NAMES} | {
            f"part-{part:05d}/{name}.npy" for name in NAMES for part in range(num_parts)
        }
        listed = write_soft_labels(run, over_parts_here)  # again: nothing is computed, the same files are named
        assert set(listed) == {f"graph/{name}" for name in added if name.endswith(".npy")}
        reset_soft_labels(run.url)
        assert files(tmp_path / str(num_parts)) == before
    for name in NAMES:
        np.testing.assert_allclose(arrays[1][name], arrays[4][name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("inference", ["exact", "sampled"])
def test_batches_made_ahead_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inference: str) -> None:
    graph, settings = GRAPHS["dense"], {"inference": inference, "batch_size": 17}
    if inference == "sampled":
        settings["fanout"] = [3, 2]
    ahead = written(prepare(tmp_path / "ahead", graph, 2, 2, **settings)[0])
    monkeypatch.setattr(soft_labels, "Prefetch", functools.partial(Prefetch, depth=0))
    inline = written(prepare(tmp_path / "inline", graph, 2, 2, **settings)[0])
    for name in NAMES:
        np.testing.assert_array_equal(ahead[name], inline[name], err_msg=name)


def test_a_full_disk_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, dtype: np.dtype, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> storage.FileInfo:
        next(iter(chunks))
        raise OSError(errno.ENOSPC, "No space left on device")

    run, _ = prepare(tmp_path, GRAPHS["dense"], 2, 2, batch_size=5)
    monkeypatch.setattr(storage, "write_chunks", full)
    with pytest.raises(OSError, match="No space left"):
        write_soft_labels(run, over_parts_here)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def files(url: Path) -> set[str]:
    return {path.relative_to(url / "graph").as_posix() for path in (url / "graph").rglob("*") if path.is_file()}


def test_cut_off_at_any_call_it_goes_on_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path / "whole", GRAPHS["dense"], 2, 3, inference="exact")
    before, expected = files(tmp_path / "whole"), written(run)
    cut, _ = prepare(tmp_path / "cut", GRAPHS["dense"], 2, 3, inference="exact")
    calls = [0]

    def failing(run: Run, make_worker: MakeWorker, parts: list[int]) -> list[storage.FileInfo]:
        worker, infos = make_worker(), []
        for part in parts:
            calls[0] += 1
            if calls[0] % 4 == 0:
                raise RuntimeError("cut off")
            infos.append(worker(part))
        return infos

    for _ in range(20):  # every run gets three calls further
        with contextlib.suppress(RuntimeError):
            write_soft_labels(cut, failing)
            break
    assert calls[0] > 12
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    for name, array in written(cut).items():
        np.testing.assert_array_equal(array, expected[name])
    other, _ = prepare(tmp_path / "reset", GRAPHS["dense"], 2, 3, inference="exact")
    with pytest.raises(RuntimeError, match="cut off"):
        write_soft_labels(other, failing)
    assert files(tmp_path / "reset") > before
    reset_soft_labels(other.url)
    assert files(tmp_path / "reset") == before


def test_only_what_is_asked_for_is_written(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, GRAPHS["dense"], 2, 2, hidden=False, entropy_change=False)
    listed = write_soft_labels(run, over_parts_here)
    assert set(listed) == {"graph/part-00000/soft.npy", "graph/part-00001/soft.npy"}


@pytest.mark.parametrize(("store", "size"), [("float16", 2 * 5), ("top_m", 4 * 3)])
@pytest.mark.parametrize("inference", ["exact", "sampled"])
def test_fewer_bytes_say_nearly_the_same(tmp_path: Path, inference: str, store: str, size: int) -> None:
    settings = {"inference": inference, "entropy_change": store == "float16", "top_m": 3}
    found, beside = {}, {}
    for each in ("float32", store):
        run, _ = prepare(tmp_path / each, GRAPHS["dense"], 3, 2, **settings, store=each)
        write_soft_labels(run, over_parts_here)
        graph = GraphStore.open(run.graph_url)
        assert graph.width(("soft",)) == 5
        found[each] = graph.gather("soft", np.arange(240))
        names = NAMES[1:] if store == "float16" else ["hidden"]
        beside[each] = [graph.gather(name, np.arange(240)) for name in names]
    assert all(graph.array(name, 0).dtype == np.float16 for name in names)
    for rounded, exact in zip(beside[store], beside["float32"], strict=True):
        assert rounded.dtype == np.float32
        np.testing.assert_allclose(rounded, exact, rtol=2**-11, atol=2e-3)
    stored = graph.array("soft", 0)
    assert stored.dtype.itemsize * stored.shape[1] == size
    np.testing.assert_array_equal(found[store], decode(encode(found["float32"], store, 3), 5))
    np.testing.assert_array_equal(found[store].argmax(1), found["float32"].argmax(1))


def test_several_samples_are_averaged_and_come_nearer_to_all_neighbours(tmp_path: Path) -> None:
    found = {}
    for passes in (0, 1, 2, 16):  # 0: exactly
        inference = {"inference": "exact"} if not passes else {"fanout": [2, 2], "passes": passes}
        run, _ = prepare(tmp_path / str(passes), GRAPHS["dense"], 3, 2, entropy_change=False, **inference)
        write_soft_labels(run, over_parts_here)
        found[passes] = GraphStore.open(run.graph_url).gather("soft", np.arange(240))
    errors = {passes: np.abs(found[passes] - found[0]).mean() for passes in (1, 2, 16)}
    assert errors[16] < 0.5 * errors[1]
    assert errors[16] < errors[2] < errors[1]
    np.testing.assert_allclose(found[16].sum(1), 1, rtol=1e-5)
