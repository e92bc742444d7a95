"""Confidence, calibration error and disagreement with neighbours against the definitions, node by node."""

from pathlib import Path

import numpy as np
import pytest

from rbm_dist.graph.splits import VAL
from rbm_dist.serve.soft_label_figures import count, figures
from tests.small_graph import small_store


def test_against_the_definitions(tmp_path: Path) -> None:
    store = small_store(str(tmp_path))
    every = np.arange(store.num_nodes)
    soft, label, split = (store.gather(name, every) for name in ("soft", "label", "split"))
    found = figures(count(store, part) for part in range(store.num_parts))

    val = split == VAL
    sure, right = soft[val].max(1), soft[val].argmax(1) == label[val]
    assert found["confidence"] == pytest.approx(sure.mean())
    error = 0.0
    for low in np.arange(15) / 15:
        within = (sure >= low) & (sure < low + 1 / 15)
        if within.any():
            error += within.mean() * abs(sure[within].mean() - right[within].mean())
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert error > 0.01

    compared = differ = 0
    for part in range(store.num_parts):
        ids = store.ids(part)
        indptr, indices = store.array("indptr", part), store.array("indices", part)
        for row, node in enumerate(ids):
            near = [source for source in indices[indptr[row] : indptr[row + 1]] if ids[0] <= source <= ids[-1]]
            if near:
                compared += 1
                differ += soft[node].argmax() != soft[near].mean(axis=0).argmax()
    assert found["disagreement"] == pytest.approx(differ / compared)
    assert 0.05 < differ / compared < 0.95


def test_a_part_needs_no_other(tmp_path: Path) -> None:
    store = small_store(str(tmp_path))
    whole = count(store, 1)
    for other in (0, 2, 3):
        for file in (tmp_path / "graph" / f"part-{other:05d}").glob("*.npy"):
            file.unlink()
    assert count(type(store).open(store.url, parts=[1]), 1) == whole


def test_labels_that_say_nothing_are_never_right(tmp_path: Path) -> None:
    store = small_store(str(tmp_path))

    def silent(part: int) -> np.ndarray:
        return np.zeros((len(store.ids(part)), 5), np.float32)

    parts = range(store.num_parts)
    store.publish("soft", [store.write_part("soft", p, np.dtype(np.float32), (5,), [silent(p)]) for p in parts])
    found = figures(count(store, part) for part in range(4))
    assert found == {"confidence": 0.0, "calibration_error": 0.0, "disagreement": None}
