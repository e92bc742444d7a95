"""A graph of tables through Ray tasks: killed half-way, gone on with, and nothing lost, doubled or renamed."""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rbm_dist import storage
from rbm_dist.graph.store import GraphStore
from tests.patience import patient
from tests.stages.conftest import ROOT, command, rbm_dist
from tests.stages.test_kill import wait_for

NODES = 6000
KEPT = ("config", "manifest")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[tuple[str, str]]]:
    """A configuration, and the edges of its graph as pairs of the caller's ids."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    names = np.array([f"paper/{number:x}" for number in rng.permutation(NODES)])
    label = rng.integers(0, 3, NODES)
    columns = {"id": names, "label": label, "a": rng.random(NODES) + label}
    columns |= {f"b{digit}": np.arange(NODES) // 100**digit % 100 / 8 for digit in range(2)}
    for file in range(3):
        rows = slice(file * 2000, (file + 1) * 2000)
        table = pa.table({name: column[rows] for name, column in columns.items()})
        pq.write_table(table, folder / f"nodes-{file}.parquet", row_group_size=700)
    src, dst = names[rng.integers(0, NODES, (2, 40_000))]
    for file in range(8):
        part = slice(file * 5000, (file + 1) * 5000)
        pq.write_table(pa.table({"src": src[part], "dst": dst[part]}), folder / f"edges-{file}.parquet")
    links = {(u, v) for u, v in zip(src.tolist(), dst.tolist(), strict=True) if u != v}
    config = {
        "run_dir": str(folder / "run"),
        "source": {
            "kind": "tables", "nodes": f"{folder}/nodes-*.parquet", "edges": f"{folder}/edges-*.parquet",
            "undirected": False, "normalize": "none",
        },
        "partition": {"num_parts": 3, "features": "int8"},
        "cluster": {"silence_timeout_s": patient(300)},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml", links


def kill_when(condition: Callable[[], bool], config: Path) -> None:
    process = subprocess.Popen(
        command("partition", str(config)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(condition, process)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_graph(
    tables: tuple[Path, set[tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, links = tables
    run = config.parent / "run"
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # Ray's own, whose path must be short
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kill_when(lambda: len(list((run / "source" / "work").glob("*/run-*.json"))) >= 2, config)
    kill_when((run / "graph" / "spill").exists, config)
    # As of a worker that is killed while it writes.
    (run / "graph" / "spill" / f"part.npy{storage.TEMPORARY}0123abcd").touch()
    done = rbm_dist("partition", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    manifests = [storage.read_json(f"{run}/{folder}/manifest.json")["files"] for folder in ("source", "graph")]
    every = {f"{folder}/{name}.json" for folder in ("source", "graph") for name in KEPT}
    every |= {"config.json", "owner.json", "status.json", ".lock", "source/inputs.json"}
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == every.union(*manifests), "nothing is left of what was cut off"
    assert list(tmp_path.iterdir()) == []
    check_graph(run, config.parent, links)


def check_graph(run: Path, tables: Path, links: set[tuple[str, str]]) -> None:
    store = GraphStore.open(f"{run}/graph", verify=True)
    assert store.named
    ids = np.arange(store.num_nodes)
    names = np.char.decode(store.gather("orig_name", ids))
    assert len(set(names.tolist())) == NODES
    found = [
        (names[src], names[dst])
        for part in range(store.num_parts)
        for at, dst in enumerate(store.ids(part))
        for src in store.array("indices", part)[slice(*store.array("indptr", part)[at : at + 2])]
    ]
    assert len(found) == len(set(found)), "an edge is there twice"
    assert set(found) == links
    # Columns b0 and b1 say the row of the node table, and that which id it belongs to.
    rows = np.rint(store.gather("feat", ids)[:, 1:] * 8).astype(int) @ [1, 100]
    np.testing.assert_array_equal(store.gather("orig_id", ids), rows)
    expected = pq.read_table(sorted(tables.glob("nodes-*.parquet")))["id"].to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(names, expected[rows])
    assert storage.read_json(f"{run}/graph/graph.json")["partition"]["edge_cut"] > 0
