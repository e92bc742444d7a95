"""Partitioners: balanced, seeded, and far better than chance; graphs that have nothing to cut; memory."""

import itertools
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from rbm_dist.config.run import PartitionConfig
from rbm_dist.config.source import NpzConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.graph import partition as partition_
from rbm_dist.graph.csc import Csc, build
from rbm_dist.graph.partition import PARTITIONERS, available_memory, most_memory_needed, partition
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.sources.source import read

METHODS = sorted(PARTITIONERS)


@pytest.fixture(scope="module")
def cora(data_dir: Path) -> Csc:
    """Cora's structure."""
    return read(NpzConfig(path=str(data_dir / "cora.npz")), seed=0).csc


@pytest.fixture(scope="module")
def communities() -> Csc:
    """Six hundred nodes in six communities, and twenty nodes without any edge."""
    graph = nx.planted_partition_graph(6, 100, 0.1, 0.005, seed=3)
    src, dst = np.array(graph.edges).T
    return build(src, dst, 620, undirected=True)


def edge_cut(csc: Csc, part_N: np.ndarray) -> int:
    return partition_report(csc, part_N, int(part_N.max()) + 1)["edge_cut"]


def parts_of(csc: Csc, method: str, num_parts: int, imbalance: float = 0.03, seed: int = 0) -> np.ndarray:
    return partition(csc, PartitionConfig(method=method, num_parts=num_parts, imbalance=imbalance), seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_parts", "imbalance"), [(1, 0.03), (2, 0.03), (6, 0.03), (7, 0.2), (32, 0.1)])
def test_every_node_has_a_part_and_parts_are_balanced(
    communities: Csc, method: str, num_parts: int, imbalance: float
) -> None:
    part_N = parts_of(communities, method, num_parts, imbalance)
    assert (part_N.shape, part_N.dtype) == ((620,), np.int32)
    sizes = np.bincount(part_N, minlength=num_parts)
    assert len(sizes) == num_parts
    assert sizes.max() <= np.ceil((1 + imbalance) * np.ceil(620 / num_parts))
    assert sizes.min() > 0


@pytest.mark.parametrize("method", METHODS)
def test_parts_depend_on_the_seed_alone(cora: Csc, method: str) -> None:
    first = parts_of(cora, method, 4, seed=1)
    other = parts_of(cora, method, 4, seed=2)
    np.testing.assert_array_equal(parts_of(cora, method, 4, seed=1), first)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("preset", ["fast", "default", "terapart"])
@pytest.mark.parametrize("num_parts", [2, 8])
def test_kaminpar_cuts_far_fewer_edges_than_chance(cora: Csc, num_parts: int, preset: str) -> None:
    part_N = partition(cora, PartitionConfig(num_parts=num_parts, preset=preset), seed=0)
    sizes = np.bincount(part_N, minlength=num_parts)
    assert sizes.max() <= np.ceil(1.03 * np.ceil(cora.num_nodes / num_parts))
    by_chance = cora.num_edges * (1 - 1 / num_parts)
    assert edge_cut(cora, parts_of(cora, "random", num_parts)) == pytest.approx(by_chance, rel=0.1)
    assert edge_cut(cora, part_N) < 0.25 * by_chance


def test_streaming_cuts_fewer_edges_than_chance(cora: Csc) -> None:
    assert edge_cut(cora, parts_of(cora, "streaming", 8)) < 0.35 * edge_cut(cora, parts_of(cora, "random", 8))


def test_kaminpar_finds_separate_cliques() -> None:
    graph = nx.disjoint_union_all([nx.complete_graph(12)] * 4)
    order = np.random.default_rng(0).permutation(48)
    src, dst = order[np.array(graph.edges).T]
    csc = build(src, dst, 48, undirected=True)
    part_N = parts_of(csc, "kaminpar", 4)
    assert edge_cut(csc, part_N) == 0
    np.testing.assert_array_equal(np.bincount(part_N), [12] * 4)


def test_kaminpar_takes_a_directed_graph_as_undirected() -> None:
    # Two directed rings, joined by one edge.
    rings = [(start + i, start + (i + 1) % 20) for start in (0, 20) for i in range(20)]
    src, dst = np.array([*rings, (3, 25)]).T
    csc = build(src, dst, 40, undirected=False)
    assert edge_cut(csc, parts_of(csc, "kaminpar", 2)) <= 3


@pytest.mark.parametrize("balance", ["nodes", "both"])
@pytest.mark.parametrize("method", ["kaminpar", "streaming"])
def test_parts_do_not_depend_on_how_the_graph_is_held(
    cora: Csc, method: str, balance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PartitionConfig(method=method, balance=balance)
    expected = partition(cora, config, seed=0)
    for name, array in (("indptr", cora.indptr), ("indices", cora.indices)):
        np.save(tmp_path / f"{name}.npy", array)
    mapped = Csc(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("indptr", "indices")))
    monkeypatch.setattr(partition_, "_CHUNK", 1000)
    np.testing.assert_array_equal(partition(mapped, config, 0, symmetric=True), expected)
    wide = Csc(cora.indptr, cora.indices.astype(np.int64))
    np.testing.assert_array_equal(partition(wide, config, 0, symmetric=True), expected)


@pytest.mark.parametrize("method", ["kaminpar", "streaming"])
@pytest.mark.parametrize("balance", ["edges", "both"])
def test_parts_balance_what_is_asked_for(method: str, balance: str) -> None:
    # A popular node has many times the mean degree, and the first nodes are the popular ones.
    src, dst = np.array(nx.barabasi_albert_graph(2000, 4, seed=0).edges).T
    csc = build(src, dst, 2100, undirected=True)
    part_N = partition(csc, PartitionConfig(method=method, balance=balance), seed=0)
    degree = np.diff(csc.indptr)
    weight = degree + 1 if balance == "edges" else 1 + degree / degree.mean()
    load = np.bincount(part_N, weight, minlength=4)
    assert load.max() <= 1.04 * load.mean()
    by_nodes = np.bincount(partition(csc, PartitionConfig(method=method), seed=0), weight, minlength=4)
    assert by_nodes.max() > 1.06 * by_nodes.mean()


def test_random_parts_balance_nodes_only() -> None:
    with pytest.raises(ValidationError, match=r"partition\.balance: random parts balance nodes, not edges"):
        PartitionConfig(method="random", balance="edges")


def test_kaminpar_remembers_nothing(cora: Csc) -> None:
    def parts(seed: int) -> list[int]:
        return partition(cora, PartitionConfig(num_parts=8, preset="terapart"), seed, symmetric=True).tolist()

    forwards = {seed: parts(seed) for seed in range(5)}
    assert {seed: parts(seed) for seed in reversed(range(5))} == forwards


@pytest.mark.parametrize(
    ("program", "reason"),
    [("raise SystemExit('no graph')", "code 1: no graph"), ("import os; os.kill(os.getpid(), 9)", "killed")],
)
def test_a_failure_of_kaminpar_is_told(
    communities: Csc, program: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_, "_SOLVE", program)
    with pytest.raises(RunError, match=reason):
        parts_of(communities, "kaminpar", 4)


def test_kaminpar_says_nothing_on_the_terminal(communities: Csc, capfd: pytest.CaptureFixture[str]) -> None:
    parts_of(communities, "kaminpar", 4)
    assert capfd.readouterr() == ("", "")


_KILLED = """
import numpy as np
from rbm_dist.config.run import PartitionConfig
from rbm_dist.graph import partition as module
from rbm_dist.graph.csc import build
module._SOLVE = "import os; os.kill(os.getppid(), 9)"
module.partition(build(np.arange(99), np.arange(1, 100), 100, undirected=True), PartitionConfig(), 0)
"""


def test_a_kill_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert subprocess.run([sys.executable, "-c", _KILLED], check=False).returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_without_edges(method: str) -> None:
    csc = Csc(np.zeros(11, np.int64), np.empty(0, np.int32))
    np.testing.assert_array_equal(np.sort(np.bincount(parts_of(csc, method, 4))), [2, 2, 3, 3])
    assert edge_cut(csc, parts_of(csc, method, 4)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_nodes", [1, 2, 9])
def test_as_many_parts_as_nodes(method: str, num_nodes: int) -> None:
    pairs = np.array(list(itertools.combinations(range(num_nodes), 2))).reshape(-1, 2)
    csc = build(*pairs.T, num_nodes, undirected=True)
    part_N = parts_of(csc, method, num_nodes)
    assert set(part_N.tolist()) == set(range(num_nodes))


@pytest.mark.parametrize("method", METHODS)
def test_more_parts_than_nodes_are_refused(method: str) -> None:
    csc = build(np.array([0]), np.array([1]), 3, undirected=True)
    with pytest.raises(InputError, match=r"partition\.num_parts: 4 parts for a graph of 3 node"):
        parts_of(csc, method, 4)


def test_too_little_memory_is_refused_with_what_to_do(cora: Csc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        partition_, "available_memory", lambda: most_memory_needed(PartitionConfig(preset="terapart"), 2708, 10556)
    )
    with pytest.raises(
        InputError, match=r"kaminpar, preset fast, may need 0\.\d+ GB .* 2,708 nodes and 10,556 edges"
    ) as refusal:
        partition(cora, PartitionConfig(), seed=0)
    assert "partition.preset: terapart" in str(refusal.value)
    assert "partition.method: streaming" in str(refusal.value)
    monkeypatch.setattr(partition_, "available_memory", lambda: 200_000)
    with pytest.raises(InputError, match=r"available; set partition\.method: streaming \(at most 0\.00 GB\)$"):
        partition(cora, PartitionConfig(preset="terapart"), seed=0)
    parts_of(cora, "streaming", 4)
    monkeypatch.setattr(partition_, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"streaming may need .*; use a machine with more memory"):
        parts_of(cora, "streaming", 4)


def test_available_memory_is_no_more_than_the_machine_has() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_available_memory_is_what_control_groups_leave(tmp_path: Path) -> None:
    job = tmp_path / "sys/fs/cgroup/job"
    (job / "step").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/job/step\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (job / "step/memory.max").write_text("max\n")
    (job / "memory.max").write_text("5000000\n")
    (job / "memory.current").write_text("3000000\n")
    (job / "memory.stat").write_text("anon 1900000\nactive_file 100000\ninactive_file 1000000\n")
    assert available_memory(tmp_path) == 5_000_000 - 3_000_000 + 1_100_000
