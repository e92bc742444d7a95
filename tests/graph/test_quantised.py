"""Features in fewer bytes: the documented bounds, whatever the values; and what a store of several parts gives back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph import shuffle
from rbm_dist.graph.quantised import decode, encode, scales
from rbm_dist.graph.store import GraphStore
from tests.small_graph import small_graph, with_sparse_features, write_graph

GRAPH = small_graph()
(FEAT,) = GRAPH.feat_chunks()
PART = np.random.default_rng(2).choice(4, len(FEAT), p=[0.1, 0.2, 0.3, 0.4]).astype(np.int32)
_ROUNDING = 1 + 1e-5  # of float32


def columns(largest: float) -> st.SearchStrategy[np.ndarray]:
    """Features whose columns may be of very different magnitude."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-largest, largest, width=32))


def read_back(feat_nF: np.ndarray, dtype: str) -> np.ndarray:
    scale_F = scales(dtype, np.abs(feat_nF).max(axis=0))
    stored_nF = encode(feat_nF, dtype, scale_F)
    assert stored_nF.dtype == dtype
    found_nF = decode(stored_nF, scale_F)
    assert found_nF.dtype == np.float32
    return found_nF


@given(feat_nF=columns(float(np.finfo(np.float32).max)))
def test_int8_is_off_by_half_a_step_at_most(feat_nF: np.ndarray) -> None:
    exact = feat_nF.astype(np.float64)
    bound_F = np.maximum(np.abs(exact).max(axis=0) / 254 * _ROUNDING, np.finfo(np.float32).tiny)
    assert np.all(np.abs(read_back(feat_nF, "int8") - exact) <= bound_F)


@given(feat_nF=columns(65_504))
def test_float16_is_off_by_a_share_of_two_to_the_minus_eleven_at_most(feat_nF: np.ndarray) -> None:
    exact = feat_nF.astype(np.float64)
    assert np.all(np.abs(read_back(feat_nF, "float16") - exact) <= np.maximum(np.abs(exact) / 2**11, 2.0**-25))


@given(feat_nF=columns(float(np.finfo(np.float32).max)))
def test_float32_is_exact(feat_nF: np.ndarray) -> None:
    np.testing.assert_array_equal(read_back(feat_nF, "float32"), feat_nF)


def test_the_largest_magnitude_and_zero_are_kept() -> None:
    feat_nF = np.array([[3, 0, -1e-3], [-1.5, 0, 5e-4]], np.float32)
    found_nF = read_back(feat_nF, "int8")
    np.testing.assert_allclose(found_nF[0], feat_nF[0], rtol=1e-6)
    assert not found_nF[:, 1].any()


def test_what_float16_cannot_hold_is_refused() -> None:
    assert scales("float16", np.array([65_504, 65_519], np.float32)) is None
    with pytest.raises(
        InputError, match=r"partition\.features: float16 .* 2 of the .* column 1 is 65520\. Set .* int8"
    ):
        scales("float16", np.array([1, 65_520, 3e9], np.float32))


@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_a_store_gives_features_back(
    tmp_path: Path, dtype: str, size: int, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "_CHUNK_ROWS", 50)  # a column's largest value is in one of several chunks
    write_graph(str(tmp_path), GRAPH, PART % num_parts, dtype)
    store = GraphStore.open(f"{tmp_path}/graph", verify=True)
    ids = np.random.default_rng(0).permutation(store.num_nodes)
    expected = FEAT[store.gather("orig_id", ids)].astype(np.float64)
    bound = {"float32": 0, "float16": np.abs(expected) / 2**11, "int8": np.abs(expected).max(axis=0) / 254 * _ROUNDING}
    for found in (store.gather("feat", ids), store.inputs(ids)):
        assert found.dtype == np.float32
        assert np.all(np.abs(found - expected) <= bound[dtype])
    stored = np.load(f"{store.url}/part-00000/feat.npy")
    assert (stored.dtype, stored.itemsize) == (dtype, size)
    index = storage.read_json(f"{store.url}/graph.json")
    assert index["dtypes"]["feat"] == dtype
    assert index["version"] == (2 if dtype == "float32" else 3), "who knows version 2 only would misread them"
    assert ("feat_scale.npy" in index["files"]) == (dtype == "int8")


def test_sparse_features_stay_float32(tmp_path: Path) -> None:
    store = write_graph(str(tmp_path), with_sparse_features(GRAPH), PART)
    assert storage.read_json(f"{store.url}/graph.json")["version"] == 2
    assert not storage.exists(f"{store.url}/feat_scale.npy")


def test_a_damaged_scale_is_named(tmp_path: Path) -> None:
    store = write_graph(str(tmp_path), GRAPH, PART, "int8")
    path = Path(store.url) / "feat_scale.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"feat_scale\.npy: not a whole \.npy array"):
        store.gather("feat", np.arange(3))
    with pytest.raises(InputError, match=r"feat_scale\.npy: truncated"):
        GraphStore.open(store.url, verify=True)
