"""k-means where the centres are known, on dense and on sparse rows, and where there is too little to cluster."""

import numpy as np
import pytest
import scipy.sparse as sp

from rbm_dist.moe.kmeans import kmeans_centres


def by_first(centres: np.ndarray) -> np.ndarray:
    return centres[np.lexsort(centres.T[::-1])]


def clusters(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows around the four corners of a square, and the corners' means."""
    rng = np.random.default_rng(0)
    corner = np.arange(rows) % 4
    x = np.array([[0, 0], [0, 9], [9, 0], [9, 9]])[corner] + rng.normal(scale=0.3, size=(rows, 2))
    return x.astype(np.float32), np.array([x[corner == each].mean(0) for each in range(4)])


@pytest.mark.parametrize("rows", [40, 1000])
@pytest.mark.parametrize("sparse", [False, True])
def test_centres(rows: int, sparse: bool) -> None:
    x, expected = clusters(rows)
    found = kmeans_centres(sp.csr_array(x) if sparse else x, 4, seed=1)
    np.testing.assert_allclose(by_first(found), by_first(expected), atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_fewer_distinct_rows_than_experts(sparse: bool) -> None:
    x = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]], np.float32)
    found = kmeans_centres(sp.csr_array(x) if sparse else x, 5, seed=1)
    np.testing.assert_array_equal(found, x[[1, 0, 1, 0, 1]])
