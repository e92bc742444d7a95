"""Graphs of PyG: any of its datasets with one graph, the file of a saved `Data`, or a `Data` at hand.

PyG itself holds such a graph in memory. Its arrays are written to the scratch folder once and then mapped in pieces.
"""

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from rbm_dist import storage
from rbm_dist.config.source import PygConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import count_classes, split_of_masks, whole_labels
from rbm_dist.sources.npy_files import NpyArray
from rbm_dist.sources.streamed import About, Edges, Nodes, StreamedSource, fingerprint

PIECE_EDGES = 1 << 22
PIECE_ROWS = 1 << 17
_CHUNK_ROWS = 1 << 13
_FORMS = ("{}_mask", "{}_idx", "{}_index", "idx_{}")
MASK_OF = {
    form.format(name): f"{part}_mask"
    for part, names in {"train": ["train"], "val": ["val", "valid"], "test": ["test"]}.items()
    for name in names
    for form in _FORMS
}
"""The masks that attributes of a graph say: as booleans, or as arrays of node numbers."""


def open_pyg(config: PygConfig, scratch: str) -> StreamedSource:
    """The configured graph. It is loaded by the first call for a scratch folder; later ones map what that one wrote.

    The file of a saved graph is loaded again when it is changed.

    Raises `InputError` if it cannot be loaded, or for what `from_data` refuses.
    """
    name = config.path or str(config.dataset)
    made_of = fingerprint(config, [storage.stamp(config.path)] if config.path else [])
    folder = storage.join(scratch, f"pyg-{made_of}")

    def work() -> dict[str, Any]:
        data = _load_file(config.path) if config.path else _load_dataset(name, config.arguments)
        return _write(data, name, folder, config.mask_column)

    facts = storage.once(storage.join(folder, "pyg.json"), work)
    return replace(_open(facts, name, folder, config.undirected), fingerprint=made_of)


def from_data(data: Any, name: str, scratch: str, undirected: bool = True, mask_column: int = 0) -> StreamedSource:
    """The graph of a `torch_geometric.data.Data`; its arrays are written below `scratch`, a folder or fsspec URL.

    x: `[N, F]` numbers. y: `[N]` or `[N, 1]` classes, -1 or NaN where there is none. edge_index: `[2, M]`.
    train_mask, val_mask, test_mask: `[N]` or `[N, S]` booleans, of which column `mask_column` counts, or node numbers
    (then also as train_idx and the like, or `split_idx`); all or none.
    Raises `InputError` for anything else.
    """
    return _open(_write(data, name, scratch, mask_column), name, scratch, undirected)


def _open(facts: dict[str, Any], name: str, scratch: str, undirected: bool) -> StreamedSource:
    arrays = {each: (storage.join(scratch, f"pyg-{each}.npy"), info) for each, info in facts["files"].items()}
    rows = facts["num_nodes"]
    return StreamedSource(
        name=name,
        num_nodes=rows,
        num_features=facts["num_features"],
        num_classes=facts["num_classes"],
        nodes=partial(_nodes, arrays),
        num_edges=facts["num_edges"],
        num_edge_pieces=-(-facts["num_edges"] // PIECE_EDGES),
        edges=partial(_edges, arrays["edge_index"][0]),
        feat_offsets=np.array([*range(0, rows, PIECE_ROWS), rows]),
        feat=partial(_feat, *arrays["x"]),
        undirected=undirected,
        about=About(
            notes={"nodes": name, "label": "y", "split": facts["split"], "edges": "edge_index"},
            left_out=[(what, why) for what, why in facts["left_out"]],
        ),
    )


def _nodes(arrays: dict[str, tuple[str, storage.FileInfo]]) -> Nodes:
    label = storage.open_array(*arrays["label"])
    split = storage.open_array(*arrays["split"]) if "split" in arrays else None
    return Nodes(label, split, np.arange(len(label)))


def _edges(url: str, piece: int) -> Iterator[Edges]:
    array = NpyArray(url, axis=1)
    edges_M2 = array.read(piece * PIECE_EDGES, min((piece + 1) * PIECE_EDGES, array.rows))
    yield edges_M2[:, 0], edges_M2[:, 1]


def _feat(url: str, info: storage.FileInfo, piece: int) -> Iterator[np.ndarray]:
    rows = storage.open_rows(url, info)[piece * PIECE_ROWS : (piece + 1) * PIECE_ROWS]
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield rows[start : start + _CHUNK_ROWS]


def _load_dataset(name: str, arguments: dict[str, Any]) -> Any:
    from torch_geometric.data import Dataset

    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"source.dataset: {name}: cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Dataset)):
        raise InputError(f"source.dataset: {name} is not a class of torch_geometric datasets")
    try:
        dataset = found(**arguments)
        graphs = len(dataset)
        data = dataset[0] if graphs else None
    except Exception as error:  # of any kind: a dataset downloads, unpacks and computes
        raise InputError(
            f"source.dataset: {name}: {type(error).__name__}: {error}. Called with source.arguments: {arguments}"
        ) from None
    if graphs != 1:
        raise InputError(f"source.dataset: {name}: {graphs:,} graphs; a dataset of one graph is needed")
    return data


def _load_file(path: str) -> Any:
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    local = storage.is_local(path)  # then tensors are mapped
    fs, inner = storage.filesystem(path)
    try:
        # A Data consists of these too, which PyG does not declare safe as it does Data.
        with (
            torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]),
            fs.open(inner, "rb") as file,
        ):
            return torch.load(storage.absolute(path) if local else file, "cpu", weights_only=True, mmap=local)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (source.path)") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {found[1]}, " if found else ""
        raise InputError(
            f"{path}: not loaded: it {what}not tensors alone, and could run code. "
            "Write a Data of tensors with torch.save(Data(x=…, edge_index=…, y=…), path)"
        ) from None
    except Exception as error:  # of many kinds: torch's, zipfile's, storage's
        raise InputError(f"{path}: not a whole file of torch.save: {' '.join(str(error).split())}") from None


def _write(data: Any, name: str, scratch: str, mask_column: int) -> dict[str, Any]:
    """Check a graph and write its arrays below `scratch`; gives what `_open` needs."""
    from torch_geometric.data import Data

    if not isinstance(data, Data):
        raise InputError(
            f"{name}: a torch_geometric.data.Data with one kind of nodes is needed, found {type(data).__name__}"
        )
    for attribute, wanted in (("x", "features"), ("y", "labels"), ("edge_index", "edges")):
        if not isinstance(data.get(attribute), torch.Tensor):
            raise InputError(f"{name}: {attribute} ({wanted}) is not there or not a tensor; found {data}")
        if data[attribute].layout != torch.strided:
            raise InputError(
                f"{name}: {attribute}: a dense tensor is needed, found one of layout {data[attribute].layout}"
            )
    feat, edge_index = data.x.detach(), data.edge_index.detach()
    if feat.dim() != 2 or not feat.numel() or feat.is_complex():
        raise InputError(f"{name}: x: rows of numbers are needed, found {feat.dtype} of shape {tuple(feat.shape)}")
    if edge_index.dim() != 2 or len(edge_index) != 2 or edge_index.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"{name}: edge_index: two rows of integers are needed, found {edge_index.dtype} of shape "
            f"{tuple(edge_index.shape)}"
        )
    if feat.dtype not in (torch.float16, torch.float32, torch.float64):
        feat = feat.float()
    label = _label(data.y, len(feat), name)
    # Its datasets number the classes themselves, and not all need occur.
    num_classes = count_classes(label, f"{name}: y", max(1, int(label.max()) + 1))
    arrays = {"x": feat.numpy(), "edge_index": edge_index.numpy(), "label": label}
    given = _given_split(data)
    masks = {MASK_OF[each]: _mask(given[each], len(label), f"{name}: {each}", mask_column) for each in given}
    split = split_of_masks(masks, label, name)
    if split is not None:
        arrays["split"] = split
    used = {"x", "y", "edge_index", "num_nodes", *given, *(["split_idx"] if "split_idx" in data else [])}
    left_out = [
        (key, "an edge is its two ends; weights are not used" if key.startswith("edge_") else "not used")
        for key in data.to_dict()
        if key not in used and data[key] is not None
    ]  # fmt: skip
    return {
        "left_out": left_out, "split": ", ".join(given),
        "num_nodes": len(label), "num_features": feat.shape[1], "num_classes": num_classes,
        "num_edges": edge_index.shape[1],
        "files": {
            each: storage.write_array(storage.join(scratch, f"pyg-{each}.npy"), array)
            for each, array in arrays.items()
        },
    }  # fmt: skip


def _label(y: torch.Tensor, num_nodes: int, name: str) -> np.ndarray:
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (num_nodes,):
        raise InputError(
            f"{name}: y: one class per node is needed, shape ({num_nodes},), found {tuple(y.shape)}; neither several "
            "labels per node nor one per graph will do"
        )
    return whole_labels(y.detach().double().numpy(), f"{name}: y")


def _given_split(data: Any) -> dict[str, Any]:
    """What a graph says of its split, by the name it says it under: masks, or arrays of node numbers."""
    given = {name: data[name] for name in MASK_OF if data.get(name) is not None}
    by_part = data.get("split_idx")  # as of OGB's `get_idx_split`
    if not given and isinstance(by_part, dict):
        given = {f"{part}_idx": each for part, each in by_part.items() if f"{part}_idx" in MASK_OF}
    return given


def _mask(given: Any, num_nodes: int, where: str, column: int) -> np.ndarray:
    """Booleans `[N]` of a mask, of one column of several masks, or of an array of node numbers."""
    mask = np.asarray(given)
    if mask.ndim == 2:
        if column >= mask.shape[1]:
            raise InputError(f"{where}: no column {column} in a mask of shape {mask.shape}; change source.mask_column")
        mask = mask[:, column]
    if mask.dtype == bool or mask.ndim != 1:
        return mask
    if len(mask) == num_nodes and np.isin(mask, (0, 1)).all():
        return mask.astype(bool)
    if mask.dtype.kind not in "iu":
        return mask
    if len(mask) and (mask.min() < 0 or mask.max() >= num_nodes):
        outside = mask[(mask < 0) | (mask >= num_nodes)]
        raise InputError(f"{where}: node {outside[0]} is out of range (0 to {num_nodes - 1})")
    found = np.zeros(num_nodes, bool)
    found[mask] = True
    return found
