"""Stages on two hosts, each of which maps only some parts and asks the other for the rest."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from rbm_dist.graph.store import GraphStore
from tests.patience import patient
from tests.stages.conftest import SHORT, rbm_dist
from tests.stages.test_evaluate import EVALUATE, results


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[str]:
    """The address of a cluster of two raylets, with a worker's room on each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_it_gives_what_a_run_gives_that_maps_everything(two_hosts: str, finished_run: Path, tmp_path: Path) -> None:
    # Three, so that wherever servers and ranks come to lie, some rank lacks a part. With two, a host may have its
    # rank's parts and the other rank's from its server: then nobody asks for anything.
    served = ["cluster.shard_servers=3", "cluster.cache_mb=1", f"cluster.collective_timeout_s={patient(120)}"]
    run = [
        "encodings",
        "configs/quickstart.yaml",
        f"run_dir={tmp_path / 'run'}",
        *SHORT,
        *served,
        "--address",
        two_hosts,
    ]
    done = rbm_dist(*run)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (GraphStore.open(f"{each}/graph") for each in (tmp_path / "run", finished_run))
    for name in ("soft", "pos", "prop"):
        for part in range(expected.num_parts):
            np.testing.assert_array_equal(found.array(name, part), expected.array(name, part), err_msg=name)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["cache_hit_rate"] for row in rows if row["loop"] == "teacher"]
    assert len(rates) == 6
    assert all(rate > 0.8 for rate in rates), "all of the digits fit a megabyte"


@pytest.mark.slow
def test_its_figures_and_predictions_are_those_of_one_host(
    two_hosts: str, finished_run: Path, copied_run: Path, tmp_path: Path
) -> None:
    shutil.rmtree(copied_run / "evaluate")
    (copied_run / "results.json").unlink()
    served = ["cluster.shard_servers=2", f"cluster.collective_timeout_s={patient(120)}"]
    done = rbm_dist(*EVALUATE, f"run_dir={copied_run}", *served, "--address", two_hosts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(copied_run) == results(finished_run)
    here, there = tmp_path / "here.parquet", tmp_path / "there"
    for out in ([str(here)], [f"{there}/", "--address", two_hosts]):
        done = rbm_dist("predict", str(finished_run), "--out", *out)
        assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(here).equals(pq.read_table(sorted(there.glob("*.parquet"))))
