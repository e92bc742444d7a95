"""Malformed inputs: each is refused with a message that names the file, the array and the reason."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist.config.source import NpzConfig
from rbm_dist.errors import InputError
from rbm_dist.sources.source import SourceGraph, read
from tests.pickle_trap import Trap
from tests.sources.npz_input import NODES, Arrays, npz_arrays, with_edges, without_masks


def read_npz(folder: Path, arrays: Arrays, **config: Any) -> SourceGraph:
    path = folder / "graph.npz"
    np.savez(path, **arrays)
    return read(NpzConfig(path=str(path), **config), seed=0)


def changed(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: change(arrays[name])}


def at(index: int, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


def dropped(*names: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


def one_node(arrays: Arrays) -> Arrays:
    attr = {"attr_data": np.ones(3), "attr_indices": np.arange(3), "attr_indptr": [0, 3], "attr_shape": [1, 3]}
    return with_edges(without_masks(arrays), [], num_nodes=1) | attr | {"labels": np.array([0])}


def no_nodes(arrays: Arrays) -> Arrays:
    attr = {"attr_data": np.ones(0), "attr_indices": np.arange(0), "attr_indptr": [0], "attr_shape": [0, 3]}
    return with_edges(without_masks(arrays), [], num_nodes=0) | attr | {"labels": np.arange(0)}


def no_features(arrays: Arrays) -> Arrays:
    attr = {"attr_data": np.ones(0), "attr_indices": np.arange(0), "attr_indptr": np.zeros(NODES + 1, int)}
    return arrays | attr | {"attr_shape": np.array([NODES, 0])}


MALFORMED = {
    "an array is missing": (dropped("attr_indptr"), "attr_indptr missing"),
    "several arrays are missing": (dropped("labels", "adj_data"), "adj_data, labels missing"),
    "nothing at all": (lambda arrays: {}, "missing; found nothing"),
    "one mask is missing": (dropped("val_mask"), "val_mask missing beside other masks"),
    "pickled labels": (changed("labels", lambda a: a.astype(object)), "labels: .*Object arrays cannot be loaded"),
    "pickled features": (changed("attr_data", lambda a: a.astype(object)), "attr_data: .*Object arrays"),
    "labels of text": (changed("labels", lambda a: a.astype(str)), "labels: class ids must be integers"),
    "labels of floats": (changed("labels", lambda a: a.astype(float)), "labels: .*found dtype float64"),
    "labels one-hot": (changed("labels", lambda a: np.eye(2, dtype=int)[a]), r"labels: shape \(8, 2\), expected"),
    "too few labels": (changed("labels", lambda a: a[:-1]), r"labels: shape \(7,\), expected \(8,\)"),
    "features of text": (changed("attr_data", lambda a: a.astype(str)), "attr_data: .*numbers, found dtype <U"),
    "features complex": (changed("attr_data", lambda a: a * 1j), "attr_data: .*numbers, found dtype complex"),
    "links of text": (changed("adj_data", lambda a: a.astype(str)), "adj_data: .*numbers, found dtype <U"),
    "float indices": (changed("adj_indices", lambda a: a.astype(float)), "adj: indptr and indices must be integers"),
    "float columns": (changed("attr_indices", lambda a: a.astype(float)), "attr: indptr and indices must be integers"),
    "float indptr": (changed("adj_indptr", lambda a: a.astype(float)), "adj: indptr and indices must be integers"),
    "masks of integers": (changed("train_mask", lambda a: a.astype(int)), "train_mask: 8 booleans.*found int64"),
    "masks of node ids": (changed("val_mask", np.flatnonzero), "val_mask: 8 booleans expected"),
    "several splits": (changed("test_mask", lambda a: np.c_[a, a]), r"test_mask: 8 booleans.*shape \(8, 2\)"),
    "adj_shape of floats": (changed("adj_shape", lambda a: a.astype(float)), "adj_shape: two sizes.*found float64"),
    "adj_shape of one size": (changed("adj_shape", lambda a: a[:1]), r"adj_shape: two sizes expected.*\(1,\)"),
    "a negative size": (changed("attr_shape", at(1, -3)), "attr_shape: two sizes expected"),
    "adj not square": (changed("adj_shape", at(1, 9)), "adj_shape: an adjacency matrix is square, found 8 × 9"),
    "indptr decreases": (changed("adj_indptr", at(4, 1)), "adj: indptr decreases after row 3"),
    "unsigned indptr decreases": (
        changed("adj_indptr", lambda a: at(4, 1)(a).astype(np.uint64)), "adj: indptr decreases after row 3"
    ),
    "indptr too short": (changed("adj_indptr", lambda a: a[:-1]), "adj: indptr has 8 entries, 8 rows need 9"),
    "indptr ends elsewhere": (changed("adj_indptr", at(-1, 15)), "adj: indptr runs from 0 to 15, but there are 16"),
    "indptr starts elsewhere": (changed("attr_indptr", at(0, 1)), "attr: indptr runs from 1"),
    "a link to nowhere": (changed("adj_indices", at(3, 8)), r"adj: 1 indices.*first 8 \(valid: 0 to 7\)"),
    "a negative node": (changed("adj_indices", at(3, -1)), "adj: 1 indices are out of range, first -1"),
    "a column too far": (changed("attr_indices", at(0, 3)), "attr: 1 indices are out of range, first 3"),
    "two-dimensional indices": (changed("adj_indices", lambda a: a[None]), "adj: .*one-dimensional"),
    "too few values": (changed("attr_data", lambda a: a[:-1]), r"attr_data: shape \(23,\)"),
    "too many feature rows": (
        lambda arrays: arrays | {"attr_indptr": np.r_[arrays["attr_indptr"], 24], "attr_shape": [9, 3]},
        "attr_shape: 9 feature rows for 8 nodes",
    ),
    "no features": (no_features, "attr_shape: nodes have no features"),
    "a NaN": (changed("attr_data", at(7, np.nan)), "attr_data: 1 features are NaN.* the first is of node 2, column 1"),
    "an infinity": (changed("attr_data", at(-1, -np.inf)), "attr_data: 1 features are NaN.* node 7, column 2"),
    "beyond float32": (changed("attr_data", lambda a: at(0, 1e39)(a.astype(float))), "attr_data: .*beyond float32"),
    "a label below -1": (changed("labels", at(5, -2)), "labels, node 5: class -2 is out of range"),
    "a gap in the labels": (changed("labels", lambda a: a * 2), "labels: .*class 2 occurs but class 1 does not"),
    "no labels": (lambda arrays: without_masks(arrays) | {"labels": np.full(NODES, -1)}, "labels: no node has a label"),
    "a node in two masks": (changed("test_mask", at(1, True)), "test_mask: node 1 is in two splits"),
    "a masked node without a label": (changed("labels", at(3, -1)), "val_mask: node 3 has no label"),
    "nothing to train on": (changed("train_mask", np.zeros_like), "the train split is empty"),
    "nothing to validate on": (changed("val_mask", np.zeros_like), "the val split is empty"),
    "one node": (one_node, "the val split is empty"),
    "no nodes": (no_nodes, "adj_shape: the graph has no nodes"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arrays_are_refused(tmp_path: Path, case: str) -> None:
    change, reason = MALFORMED[case]
    with pytest.raises(InputError, match=reason) as caught:
        read_npz(tmp_path, change(npz_arrays()))
    assert str(caught.value).startswith(f"{tmp_path}/graph.npz: ")
    assert "\n" not in str(caught.value)


def test_a_label_beyond_num_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"graph\.npz: labels, node 1: class 1 is out of range for num_classes: 1"):
        read_npz(tmp_path, npz_arrays(), num_classes=1)


def save_plain(path: Path) -> None:
    np.save(path, np.arange(3))
    path.with_suffix(".npz.npy").rename(path)


def save_other_members(path: Path) -> None:
    np.savez(path, **dropped("labels")(npz_arrays()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels", "0 1 0 1")


UNREADABLE = {
    "missing": (lambda path: None, "no such file"),
    "a directory": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole .npz archive"),
    "not an archive": (lambda path: path.write_text("node,label\n0,1\n"), "not a whole .npz archive"),
    "one plain array": (save_plain, "not an .npz archive"),
    "a member that is no array": (save_other_members, "labels: not an array"),
}


def refusal(path: Path) -> str | None:
    """The message with which a file is refused; None if it reads as the good input does."""
    try:
        graph = read(NpzConfig(path=str(path)), seed=0)
    except InputError as error:
        return str(error)
    np.testing.assert_array_equal(graph.label, npz_arrays()["labels"])
    return None


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path, trap = tmp_path / "graph.npz", Trap(tmp_path / "sprung")
    np.savez(path, **npz_arrays() | {"labels": np.array([trap] * NODES, object)})
    assert "Object arrays cannot be loaded" in str(refusal(path))
    path.write_bytes(pickle.dumps(trap))
    assert "not a whole .npz archive" in str(refusal(path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_are_refused(tmp_path: Path, case: str) -> None:
    save, reason = UNREADABLE[case]
    path = tmp_path / "graph.npz"
    save(path)
    with pytest.raises(InputError, match=reason) as caught:
        read(NpzConfig(path=str(path)), seed=0)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_whatever_the_byte(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "graph.npz"
    save(path, **npz_arrays())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("labels.npy")
    # A local header: 30 bytes, the name, and an extra field whose length stands in the last two of the 30.
    start = member.header_offset + 30 + len(member.filename)
    start += int.from_bytes(content[member.header_offset + 28 : member.header_offset + 30], "little")
    body = range(start, start + member.compress_size)
    rng = np.random.default_rng(0)
    for position in [*rng.integers(0, len(content), 150), *body]:
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        message = refusal(path)
        if message is None:  # in a field that nobody needs, such as a date, or in deflate's last bits
            assert position not in body or save is np.savez_compressed
        else:
            assert message.startswith(f"{path}: ")
    for end in rng.integers(0, len(content), 40):
        path.write_bytes(content[:end])
        assert "not a whole" in str(refusal(path))
