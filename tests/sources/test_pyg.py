"""PyG's graphs as a streamed source: datasets, saved files and `Data` objects, and what is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch_geometric.data import Data, HeteroData
from torch_geometric.datasets import FakeDataset, KarateClub

from rbm_dist.config.source import PygConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources import pyg
from rbm_dist.sources.pyg import from_data, open_pyg
from rbm_dist.sources.streamed import StreamedSource
from tests.sources.pieces import read_edges, read_features

_FAKE = "torch_geometric.datasets.FakeDataset"


def graph(**changes: Any) -> Data:
    """Ten nodes, of which 0 to 7 are in a split; `None` leaves an attribute out."""
    node = torch.arange(10)
    attributes = {
        "x": torch.randn(10, 4, generator=torch.Generator().manual_seed(0)),
        "y": node % 3,
        "edge_index": torch.stack([node, (node + 1) % 10]),
        "train_mask": node < 4,
        "val_mask": (node >= 4) & (node < 6),
        "test_mask": (node >= 6) & (node < 8),
    }
    return Data(**{name: value for name, value in (attributes | changes).items() if value is not None})


def assert_is(source: StreamedSource, data: Data) -> None:
    assert (source.num_nodes, source.num_features) == (data.num_nodes, data.num_features)
    assert source.num_classes == int(data.y.max()) + 1
    np.testing.assert_array_equal(read_edges(source), data.edge_index)
    np.testing.assert_array_equal(read_features(source), data.x)
    nodes = source.nodes()
    np.testing.assert_array_equal(nodes.label, data.y)
    np.testing.assert_array_equal(nodes.orig_id, np.arange(data.num_nodes))
    assert nodes.label.dtype == np.int64


@pytest.mark.parametrize("storage", ["tmp_path", "memory_url"])
def test_a_data_object(storage: str, request: pytest.FixtureRequest) -> None:
    source = from_data(graph(), "made here", str(request.getfixturevalue(storage)), undirected=False)
    assert_is(pickle.loads(pickle.dumps(source)), graph())
    assert (source.name, source.undirected) == ("made here", False)
    split = source.nodes().split
    assert split is not None
    assert split.tolist() == [TRAIN] * 4 + [VAL] * 2 + [TEST] * 2 + [NO_SPLIT] * 2


def test_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("PIECE_EDGES", 4), ("PIECE_ROWS", 7), ("_CHUNK_ROWS", 2)):
        monkeypatch.setattr(pyg, name, size)
    source = from_data(graph(), "pieces", str(tmp_path))
    assert source.num_edge_pieces == 3
    assert source.feat_offsets.tolist() == [0, 7, 10]
    assert [len(rows) for rows in source.feat(0)] == [2, 2, 2, 1]
    assert_is(source, graph())


def test_a_dataset_is_made_once(tmp_path: Path) -> None:
    """`FakeDataset` is another at each call: what is opened again must be what was opened first."""
    config = PygConfig(dataset=_FAKE, arguments={"avg_num_nodes": 50, "num_channels": 5, "num_classes": 4})
    source, again = (open_pyg(config, str(tmp_path)) for _ in range(2))
    assert (source.name, source.num_features, source.undirected) == (_FAKE, 5, True)
    assert source.nodes().split is None
    np.testing.assert_array_equal(read_features(again), read_features(source))
    np.testing.assert_array_equal(read_edges(again), read_edges(source))


def saved(data: Any, folder: Path) -> str:
    torch.save(data, folder / "data.pt")
    return str(folder / "data.pt")


@pytest.mark.parametrize("data", [graph(), FakeDataset(avg_num_nodes=40)[0]], ids=["made here", "of a dataset"])
def test_a_saved_file(data: Data, tmp_path: Path) -> None:
    assert_is(open_pyg(PygConfig(path=saved(data, tmp_path)), str(tmp_path / "scratch")), data)


def test_a_saved_file_on_other_storage(memory_url: str, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put_file(saved(graph(), tmp_path), f"{memory_url}/data.pt")
    assert_is(open_pyg(PygConfig(path=f"{memory_url}/data.pt"), str(tmp_path / "scratch")), graph())


@pytest.mark.parametrize("form", ["bytes", "numbers", "train_idx", "idx_train", "split_idx"])
def test_splits_as_people_have_them(form: str, tmp_path: Path) -> None:
    expected = from_data(graph(), "masks", str(tmp_path / "masks")).nodes().split
    masks = {part: graph()[f"{part}_mask"] for part in ("train", "val", "test")}
    numbers = {part: mask.nonzero()[:, 0] for part, mask in masks.items()}
    none = {f"{part}_mask": None for part in masks}
    given = {
        "bytes": {f"{part}_mask": mask.to(torch.uint8) for part, mask in masks.items()},
        "numbers": {f"{part}_mask": each for part, each in numbers.items()},
        "train_idx": none | {f"{'valid' if part == 'val' else part}_idx": each for part, each in numbers.items()},
        "idx_train": none | {f"idx_{part}": each for part, each in numbers.items()},
        "split_idx": none
        | {"split_idx": {"train": numbers["train"], "valid": numbers["val"], "test": numbers["test"]}},
    }[form]
    source = from_data(graph(**given), form, str(tmp_path / "given"))
    np.testing.assert_array_equal(source.nodes().split, expected)
    assert source.about.notes["split"]


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    weights = torch.rand(graph().edge_index.shape[1])
    found = from_data(graph(edge_weight=weights, pos=torch.rand(10, 2)), "weights", str(tmp_path)).about.left_out
    assert sorted(name for name, _ in found) == ["edge_weight", "pos"]


@pytest.mark.parametrize("column", [0, 1])
def test_masks_of_several_splits(column: int, tmp_path: Path) -> None:
    one = graph()
    train, val = torch.stack([one.train_mask, one.val_mask], 1), torch.stack([one.val_mask, one.train_mask], 1)
    source = from_data(graph(train_mask=train, val_mask=val), "several", str(tmp_path), mask_column=column)
    split = source.nodes().split
    assert split is not None
    assert np.flatnonzero(split == TRAIN).tolist() == [[0, 1, 2, 3], [4, 5]][column]
    assert np.flatnonzero(split == TEST).tolist() == [6, 7]


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(torch.float64, np.float64), (torch.bfloat16, np.float32), (torch.int64, np.float32), (torch.bool, np.float32)],
)
def test_features_of_other_types(dtype: torch.dtype, found: type, tmp_path: Path) -> None:
    feat = read_features(from_data(graph(x=torch.eye(10).to(dtype)), "types", str(tmp_path)))
    assert feat.dtype == found
    np.testing.assert_array_equal(feat, np.eye(10))


def test_labels_as_a_column_with_gaps(tmp_path: Path) -> None:
    label = torch.arange(10.0)[:, None] % 3
    label[8:] = torch.nan
    nodes = from_data(graph(y=label), "column", str(tmp_path)).nodes()
    assert nodes.label.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, -1, -1]


REFUSED = {
    "no features": ({"x": None}, r"x \(features\) is not there"),
    "no labels": ({"y": None}, r"y \(labels\) is not there"),
    "no edges": ({"edge_index": None}, r"edge_index \(edges\) is not there"),
    "sparse features": ({"x": torch.eye(10).to_sparse()}, "x: a dense tensor is needed, found .*sparse_coo"),
    "features in one row": ({"x": torch.ones(10)}, r"x: rows of numbers .*shape \(10,\)"),
    "edges in columns": ({"edge_index": torch.zeros(5, 2, dtype=torch.long)}, r"edge_index: two rows .*\(5, 2\)"),
    "edges of floats": ({"edge_index": torch.zeros(2, 5)}, "edge_index: two rows of integers .*float32"),
    "one label for the graph": ({"y": torch.tensor([1])}, r"y: one class per node .*\(10,\), found \(1,\)"),
    "several labels": ({"y": torch.ones(10, 3)}, r"y: .*found \(10, 3\).*several labels per node"),
    "half a label": ({"y": torch.full((10,), 0.5)}, "y, node 0: 0.5 is not a class"),
    "a label below -1": ({"y": torch.full((10,), -2)}, "y, node 0: class -2 is out of range"),
    "labels nowhere": ({"y": torch.full((10,), -1)}, "y: no node has a label"),
    "one mask": ({"val_mask": None, "test_mask": None}, "val_mask, test_mask missing beside other masks"),
    "masks of floats": ({"train_mask": torch.rand(10)}, r"train_mask: 10 booleans expected, found float32"),
    "a number of no node": ({"train_mask": torch.tensor([3, 10])}, r"train_mask: node 10 is out of range \(0 to 9\)"),
    "a column too few": (
        {"val_mask": torch.ones(10, 2, dtype=torch.bool)}, r"val_mask: no column 2 .*\(10, 2\); change source"
    ),
    "a node in two masks": ({"test_mask": torch.arange(10) < 1}, "test_mask: node 0 is in two splits"),
    "a masked node without a label": ({"y": torch.arange(10) - 1}, "train_mask: node 0 has no label"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_malformed_data(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(InputError, match=f"^here: {message}"):
        from_data(graph(**changes), "here", str(tmp_path), mask_column=2)


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        ("torch_geometric.datasets.Nowhere", {}, "cannot be imported"),
        ("no_such_package.Planetoid", {}, "cannot be imported: No module named 'no_such_package'"),
        ("Planetoid", {}, "cannot be imported"),
        ("os.system", {"command": "true"}, "is not a class of torch_geometric datasets"),
        (_FAKE, {"avg_nodes": "x", "num_graphs": "2"}, "TypeError: .*Called with source.arguments: .*num_graphs"),
        (_FAKE, {"num_graphs": 2}, "2 graphs; a dataset of one graph is needed"),
        ("torch_geometric.datasets.FakeHeteroDataset", {}, "one kind of nodes is needed, found HeteroData"),
        ("torch_geometric.datasets.KarateClub", {}, "val_mask, test_mask missing"),
    ],
)
def test_datasets_that_are_refused(dataset: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{dataset}.*{message}"):
        open_pyg(PygConfig(dataset=dataset, arguments=arguments), str(tmp_path))


class Harmful:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return (pytest.fail, ("the file was run",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Harmful(), r"not loaded: it holds _pytest\.outcomes\.\S+, not tensors alone"),
        (graph(y=np.arange(10)), r"not loaded: it holds numpy\S+, not tensors alone"),
        (HeteroData(), "not tensors alone"),
        (KarateClub()._data.to_dict(), "found dict"),
        (torch.ones(3), "found Tensor"),
    ],
)
def test_files_that_are_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\.pt: .*{message}"):
        open_pyg(PygConfig(path=saved(data, tmp_path)), str(tmp_path))


@pytest.mark.parametrize("size", [0, 5, 900])
def test_a_file_cut_off(size: int, tmp_path: Path) -> None:
    path = Path(saved(graph(), tmp_path))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"data\.pt: not a whole file of torch\.save"):
        open_pyg(PygConfig(path=str(path)), str(tmp_path))
    with pytest.raises(InputError, match=r"other\.pt: no such file"):
        open_pyg(PygConfig(path=str(tmp_path / "other.pt")), str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either `dataset` or `path`"),
        ({"dataset": _FAKE, "path": "data.pt"}, "either `dataset` or `path`"),
        ({"path": "data.pt", "arguments": {"name": "Cora"}}, "source.arguments"),
    ],
)
def test_a_configuration_names_one_graph(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PygConfig(**fields)
