"""A whole run on object storage, its input too: killed, gone on with, and looked at again."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from rbm_dist import storage
from rbm_dist.config.load import load
from rbm_dist.graph.store import GraphStore
from rbm_dist.stages import local
from tests.patience import patient
from tests.small_graph import small_graph
from tests.sources import table_input
from tests.stages.conftest import kill_once, rbm_dist

SETTINGS = {
    "partition": {"num_parts": 3}, "teacher": {"epochs": 4, "hidden": 8, "fanout": [4, 4], "batch_size": 64},
    "student": {"epochs": 6, "pretrain_epochs": 2, "hidden": 8, "batch_size": 64, "models": ["rbm"], "num_experts": 4},
    "encodings": {"label_propagation": True},
    "cluster": {"checkpoint_every": 1, "train_workers": 2, "silence_timeout_s": patient(60)},
}  # fmt: skip


@pytest.fixture
def config(s3_url: str, tmp_path: Path) -> str:
    """The configuration of a run below `s3_url`, whose tables are there, too."""
    graph = small_graph(600, num_classes=3)
    feat_NF = next(iter(graph.feat_chunks()))
    ids = np.arange(600)
    split = np.array(["train", "val", "test"])[graph.split]
    feat = pa.FixedSizeListArray.from_arrays(pa.array(feat_NF.reshape(-1)), feat_NF.shape[1])
    edges = {"src": graph.csc.indices, "dst": np.repeat(ids, np.diff(graph.csc.indptr))}
    for name, columns in (("nodes", {"id": ids, "label": graph.label, "split": split, "feat": feat}), ("edges", edges)):
        table_input.save(f"{s3_url}/input/{name}.parquet", columns, row_group_size=10_000)
    source = {"kind": "tables", "nodes": f"{s3_url}/input/nodes.parquet", "edges": f"{s3_url}/input/edges.parquet"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run_dir": f"{s3_url}/run", "source": source, **SETTINGS}))
    return str(path)


def test_all_stages_in_this_process_give_what_they_give_on_a_local_disk(
    config: str, s3_url: str, tmp_path: Path, one_thread: None
) -> None:
    settings = load(config, None)
    found = {}
    for url in (f"{s3_url}/run", str(tmp_path / "run")):
        teacher, student = local.prepare(settings, url), local.train(settings, url, f"{url}/student")
        found[url] = {**teacher, **student, "seconds": 0}
    on_s3, here = found.values()
    assert on_s3 == here
    assert storage.listdir(f"{s3_url}/run/graph") == storage.listdir(f"{tmp_path}/run/graph")


def test_predictions_of_every_kind_are_read_from_object_storage(config: str, s3_url: str, tmp_path: Path) -> None:
    soft_4NC = np.random.default_rng(0).dirichlet(np.ones(3), (4, 600)).astype(np.float32) / 2
    soft_4NC[:, np.arange(600), small_graph(600, num_classes=3).label] += 0.5
    np.save(tmp_path / "soft.npy", soft_4NC[0])
    np.savez(tmp_path / "soft.npz", soft_4NC[1])
    torch.save(torch.from_numpy(soft_4NC[2]), tmp_path / "soft.pt")
    pq.write_table(pa.table({f"class{c}": soft_4NC[3, :, c] for c in range(3)}), tmp_path / "soft.parquet")
    paths = [f"{s3_url}/soft.{suffix}" for suffix in ("npy", "npz", "pt", "parquet")]
    for path in paths:
        storage.copy_in(tmp_path / Path(path).name, path)
    settings = load(config, [f"teacher.external={{paths: [{', '.join(paths)}], kind: probabilities}}"])
    local.prepare(settings, f"{s3_url}/run")
    store = GraphStore.open(f"{s3_url}/run/graph")
    found, orig = (store.gather(name, np.arange(600)) for name in ("soft", "orig_id"))
    np.testing.assert_allclose(found, soft_4NC.mean(0)[orig], atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(patient(300))
def test_a_run_on_object_storage_goes_on_after_a_kill(config: str, s3_url: str, local_cache: Path) -> None:
    run = f"{s3_url}/run"

    def trained() -> bool:
        steps = storage.listdir(f"{run}/teacher/checkpoints")
        return any(storage.exists(f"{run}/teacher/checkpoints/{step}/checkpoint.json") for step in steps)

    kill_once(trained, "run", config)
    done = rbm_dist("run", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "partition: done before" in done.stdout
    assert "(went on from where it was)" in done.stdout
    results = storage.read_json(f"{run}/results.json")
    assert results["students"]["rbm"]["test"] > 0.4
    cached = list((local_cache / "cache").iterdir())
    assert all(path.suffix == ".npy" for path in cached)

    fs, folder = storage.filesystem(f"{run}/source")
    for path in fs.find(folder):
        if path.endswith(".npy"):
            fs.rm_file(path)
    again = rbm_dist("run", config, "--verify")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before, verified") == 7
    assert storage.read_json(f"{run}/results.json") == results

    table_input.save(f"{s3_url}/input/edges.parquet", {"src": [0], "dst": [1]})
    changed = rbm_dist("run", config)
    assert changed.returncode == 2
    assert "the input was changed after it was read" in changed.stderr + changed.stdout
