"""k-means where the centres are known, on dense and on sparse rows, on several ranks, and against scikit-learn's."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from rbm_dist.moe.collectives import traffic
from rbm_dist.moe.dispatch import AllToAllDispatcher
from rbm_dist.moe.sparse_rows import Rows, SparseRows, to_scipy, unit
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.train.kmeans import kmeans_centres
from tests.gloo import run_ranks


def by_first(centres: np.ndarray) -> np.ndarray:
    return centres[np.lexsort(centres.T[::-1])]


def clusters(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows around the four corners of a square, and the corners' means."""
    rng = np.random.default_rng(0)
    corner = np.arange(rows) % 4
    x = np.array([[0, 0], [0, 9], [9, 0], [9, 9]])[corner] + rng.normal(scale=0.3, size=(rows, 2))
    return x.astype(np.float32), np.array([x[corner == each].mean(0) for each in range(4)])


def inertia(rows: np.ndarray | sp.csr_array, centres: np.ndarray) -> float:
    """The sum of squared distances to the nearest centre, by the definition."""
    squares = np.asarray((rows * rows).sum(1)).ravel()
    distances = squares[:, None] - 2 * (rows @ centres.T) + (centres * centres).sum(1)
    return float(distances.min(1).sum())


def one_process(rows: np.ndarray | sp.csr_array, num_experts: int, seed: int = 1) -> np.ndarray:
    given: Rows = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else SparseRows.of(rows)
    return kmeans_centres(given, np.arange(rows.shape[0]), num_experts, seed, Mesh.single())


# The last is more than the sample that scikit-learn sees.
@pytest.mark.parametrize("rows", [40, 1000, 12_000])
@pytest.mark.parametrize("sparse", [False, True])
def test_centres(rows: int, sparse: bool) -> None:
    x, expected = clusters(rows)
    found = one_process(sp.csr_array(x) if sparse else x, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(by_first(found), by_first(expected), atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("times", [1, 4000])
def test_fewer_distinct_rows_than_experts(sparse: bool, times: int) -> None:
    x = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]] * times, np.float32)
    found = one_process(sp.csr_array(x) if sparse else x, 5)
    assert found.shape == (5, 3)
    np.testing.assert_array_equal(np.unique(found, axis=0), [[0, 1, 0], [1, 0, 0]])


def share(rank: int, owner: np.ndarray, x: np.ndarray, sparse: bool, num_experts: int) -> np.ndarray:
    """One rank's call, with the rows that are dealt to it in another order."""
    mesh = Mesh.init(1, torch.device("cpu")) if dist.get_world_size() > 1 else Mesh.single()
    ids = np.flatnonzero(owner % dist.get_world_size() == rank)[::-1].copy()
    rows: Rows = SparseRows.of(sp.csr_array(x[ids]), torch.float64) if sparse else torch.from_numpy(x[ids])
    return kmeans_centres(rows, ids, num_experts, 3, mesh)


@pytest.mark.parametrize("sparse", [False, True])
def test_ranks_make_no_difference(sparse: bool) -> None:
    """One rank, and four of which one has no rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(15_000, 6)) * (rng.random((15_000, 6)) < 0.5)
    owner = rng.choice([0, 1, 3], len(x))
    (expected,) = run_ranks(share, 1, owner, x, sparse, 9)
    for found in run_ranks(share, 4, owner, x, sparse, 9):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 60), width=st.integers(1, 5), num_experts=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_centre_is_the_mean_of_its_rows(rows: int, width: int, num_experts: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-2, 3, (rows, width)).astype(np.float64)
    centres = one_process(x, num_experts, seed)
    assert centres.shape == (num_experts, width)
    nearest = ((x[:, None] - centres) ** 2).sum(2).argmin(1)
    for expert in np.unique(nearest):
        assert np.isfinite(centres[expert]).all()
    assert inertia(x, centres) <= ((x - x.mean(0)) ** 2).sum() + 1e-9, "no worse than one cluster"


@pytest.mark.parametrize("sparse", [False, True])
def test_as_good_as_scikit_learn_on_a_real_graph(data_dir: Path, sparse: bool) -> None:
    with np.load(data_dir / "pubmed.npz") as arrays:
        names = ("attr_data", "attr_indices", "attr_indptr")
        rows = sp.csr_array(tuple(arrays[name] for name in names), shape=arrays["attr_shape"])
    projection = np.random.default_rng(0).normal(size=(rows.shape[1], 24)).astype(np.float32)
    x = unit(SparseRows.of(rows) if sparse else torch.from_numpy(rows @ projection))
    found = kmeans_centres(x, np.arange(len(x)), 16, 0, Mesh.single())
    expected = KMeans(16, n_init=2, random_state=0).fit(to_scipy(x)).cluster_centers_
    assert inertia(to_scipy(x), found) <= 1.01 * inertia(to_scipy(x), expected)


def test_centres_come_in_the_order_of_their_rows() -> None:
    rng = np.random.default_rng(0)
    community = np.repeat(np.arange(8), 100)
    x = 9 * np.eye(8)[rng.permutation(8)][community] + rng.normal(size=(800, 8))
    centres = one_process(x, 8)
    np.testing.assert_array_equal(((x[:, None] - centres) ** 2).sum(2).argmin(1), community)


def exchanged(rank: int, x: np.ndarray, centres: np.ndarray) -> int:
    """Bytes that a rank with half of the rows sends when rows go to the experts of their centres and back."""
    half = x[: len(x) // 2] if rank == 0 else x[len(x) // 2 :]
    chosen = torch.from_numpy(((half[:, None] - centres) ** 2).sum(2).argmin(1))[:, None]
    dispatcher = AllToAllDispatcher(len(centres), dist.group.WORLD)
    before = traffic.sent
    routed = dispatcher.dispatch(torch.from_numpy(half), chosen, torch.ones(len(half), 1), None)
    assert isinstance(routed.rows_TD, torch.Tensor)
    dispatcher.combine(routed.rows_TD, routed.meta)
    return int(traffic.sent - before)


def test_rows_of_communities_mostly_stay_on_their_rank() -> None:
    """Parts in order, experts in order: a third of the bytes of experts that are placed by chance, or less."""
    rng = np.random.default_rng(1)
    community = np.minimum(np.arange(800) // 100, 7)
    community[rng.random(800) < 0.1] = rng.integers(0, 8)  # some neighbours are elsewhere
    x = 9 * np.eye(8)[rng.permutation(8)][community] + rng.normal(size=(800, 8))
    centres = one_process(x, 8)
    by_chance = sum(run_ranks(exchanged, 2, x, centres[rng.permutation(8)]))
    assert sum(run_ranks(exchanged, 2, x, centres)) < 0.35 * by_chance
