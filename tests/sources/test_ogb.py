"""OGB's datasets, from small folders in OGB's own layout: what is read, what is refused, what `ogb` reads there."""

import gzip
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest

from rbm_dist.config.source import OgbConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources import ogb
from rbm_dist.sources.ogb import open_ogb
from tests.sources.pieces import read_edges, read_features

N, F, M = 60, 7, 200
_FOLDERS = {"ogbn-arxiv": "time", "ogbn-products": "sales_ranking", "ogbn-papers100M": "time"}


class Truth:
    """What the fabricated folders hold."""

    def __init__(self, name: str):
        rng = np.random.default_rng(3)
        self.edge_index = rng.integers(0, N, (2, M))
        self.feat = rng.standard_normal((N, F)).astype(np.float32)
        self.label = rng.integers(0, 40, N).astype(float)
        order = rng.permutation(N)
        self.ids = {"train": order[:20], "valid": order[20:30], "test": order[30:50]}
        if name == "ogbn-papers100M":
            self.label[order[50:]] = np.nan


def write_csv(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as stream:
        for row in np.asarray(rows).reshape(len(rows), -1):
            stream.write(",".join(str(value) for value in row) + "\n")


def write_folder(root: Path, name: str, order: str = "C") -> Path:
    truth, folder = Truth(name), root / name.replace("-", "_")
    for part, ids in truth.ids.items():
        write_csv(folder / "split" / _FOLDERS[name] / f"{part}.csv.gz", ids)
    raw = folder / "raw"
    raw.mkdir(parents=True)
    (folder / "RELEASE_v1.txt").touch()
    if name == "ogbn-papers100M":
        np.savez_compressed(
            raw / "data.npz", edge_index=np.asarray(truth.edge_index, order=order), node_feat=truth.feat,
            node_year=np.full((N, 1), 2015), num_nodes_list=np.array([N]), num_edges_list=np.array([M]),
        )  # fmt: skip
        np.savez_compressed(raw / "node-label.npz", node_label=truth.label[:, None].astype(np.float32))
    else:
        write_csv(raw / "edge.csv.gz", truth.edge_index.T)
        write_csv(raw / "node-feat.csv.gz", truth.feat)
        write_csv(raw / "node-label.csv.gz", truth.label.astype(int))
        write_csv(raw / "node_year.csv.gz", np.full(N, 2015))
        write_csv(raw / "num-node-list.csv.gz", [N])
        write_csv(raw / "num-edge-list.csv.gz", [M])
    return folder


def read_all(name: str, root: Path) -> None:
    source = open_ogb(OgbConfig(name=name, root=str(root)))
    source.nodes()
    read_edges(source)
    read_features(source)


@pytest.mark.parametrize("name", list(_FOLDERS))
def test_a_folder_in_ogbs_layout(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, name)
    truth = Truth(name)
    source = pickle.loads(pickle.dumps(open_ogb(OgbConfig(name=name, root=str(tmp_path)))))
    classes = {"ogbn-arxiv": 40, "ogbn-products": 47, "ogbn-papers100M": 172}[name]
    assert (source.num_nodes, source.num_features, source.num_classes, source.undirected) == (N, F, classes, True)
    np.testing.assert_array_equal(read_edges(source), truth.edge_index)
    np.testing.assert_array_equal(read_features(source), truth.feat)
    nodes = source.nodes()
    np.testing.assert_array_equal(nodes.label, np.nan_to_num(truth.label, nan=-1))
    split = np.full(N, NO_SPLIT)
    for part, code in (("train", TRAIN), ("valid", VAL), ("test", TEST)):
        split[truth.ids[part]] = code
    np.testing.assert_array_equal(nodes.split, split)
    np.testing.assert_array_equal(nodes.orig_id, np.arange(N))
    assert (nodes.label.dtype, nodes.split.dtype) == (np.int64, np.int8)


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    write_folder(tmp_path, "ogbn-arxiv")
    found = [open_ogb(OgbConfig(name="ogbn-arxiv", root=str(tmp_path))).fingerprint for _ in range(2)]
    write_csv(tmp_path / "ogbn_arxiv" / "raw" / "edge.csv.gz", Truth("ogbn-arxiv").edge_index.T[1:])
    found.append(open_ogb(OgbConfig(name="ogbn-arxiv", root=str(tmp_path))).fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("stored", [False, True])
def test_pieces_and_chunks_of_an_npz(order: str, stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_folder(tmp_path, "ogbn-papers100M", order) / "raw" / "data.npz"
    if stored:
        np.savez(data, **dict(np.load(data)))
    monkeypatch.setattr(ogb, "PIECE_EDGES", 70)
    monkeypatch.setattr(ogb, "PIECE_VALUES", 23 * F)
    monkeypatch.setattr(ogb, "_CHUNK", 32)
    source, truth = open_ogb(OgbConfig(name="ogbn-papers100M", root=str(tmp_path))), Truth("ogbn-papers100M")
    assert source.num_edge_pieces == 3
    assert source.feat_offsets.tolist() == [0, 23, 46, N]
    assert [sum(len(src) for src, _ in source.edges(piece)) for piece in (2, 0, 1)] == [60, 70, 70]
    np.testing.assert_array_equal(read_edges(source), truth.edge_index)
    chunks = list(source.feat(1))
    assert max(len(rows) for rows in chunks) == 32 // F
    np.testing.assert_array_equal(np.concatenate(chunks), truth.feat[23:46])
    np.testing.assert_array_equal(read_features(source), truth.feat)


def test_a_csv_file_comes_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, "ogbn-products")
    monkeypatch.setattr(ogb, "_CSV_BLOCK", 500)
    source = open_ogb(OgbConfig(name="ogbn-products", root=str(tmp_path)))
    assert len(list(source.edges(0))) > 2
    assert len(list(source.feat(0))) > 2
    np.testing.assert_array_equal(read_edges(source), Truth("ogbn-products").edge_index)
    np.testing.assert_array_equal(read_features(source), Truth("ogbn-products").feat)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-papers100M"])
def test_on_other_storage(name: str, tmp_path: Path, memory_url: str) -> None:
    write_folder(tmp_path, name)
    fsspec.filesystem("memory").put(str(tmp_path), memory_url, recursive=True)
    np.testing.assert_array_equal(read_features(open_ogb(OgbConfig(name=name, root=memory_url))), Truth(name).feat)


@pytest.mark.parametrize("name", list(_FOLDERS))
def test_ogb_reads_the_same(name: str, tmp_path: Path) -> None:
    """The layout is OGB's own: its package, where installed, reads the same arrays from the fabricated folder."""
    io = pytest.importorskip("ogb.io.read_graph_raw", reason="ogb is not installed")
    raw = str(write_folder(tmp_path, name) / "raw")
    if name == "ogbn-papers100M":
        (graph,) = io.read_binary_graph_raw(raw)
    else:
        (graph,) = io.read_csv_graph_raw(raw, add_inverse_edge=False, additional_node_files=["node_year"])
    source = open_ogb(OgbConfig(name=name, root=str(tmp_path)))
    assert graph["num_nodes"] == source.num_nodes
    np.testing.assert_array_equal(graph["edge_index"], read_edges(source))
    np.testing.assert_array_equal(graph["node_feat"], read_features(source))


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-products"])
def test_ogbs_dataset_has_the_same_labels_and_split(name: str, tmp_path: Path) -> None:
    dataset = pytest.importorskip("ogb.nodeproppred", reason="ogb is not installed").NodePropPredDataset
    (write_folder(tmp_path, name) / "processed").mkdir()  # as in OGB's archives
    theirs = dataset(name, root=str(tmp_path))
    nodes = open_ogb(OgbConfig(name=name, root=str(tmp_path))).nodes()
    np.testing.assert_array_equal(theirs[0][1][:, 0], nodes.label)
    for part, ids in theirs.get_idx_split().items():
        np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(nodes.split == ogb._SPLITS[part]))


def broken_csv(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (path,) = folder.rglob(f"{name}.csv.gz")
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        path.write_bytes(gzip.compress(("\n".join(change(lines)) + "\n").encode()))

    return apply


def cut_off(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[:-30])

    return apply


def first(line: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [line, *lines[1:]]


MALFORMED_CSV = {
    "an edge with three ends": (broken_csv("edge", first("1,2,3")), r"raw/edge\.csv\.gz: .*2 column"),
    "an edge to a name": (broken_csv("edge", first("1,x")), r"raw/edge\.csv\.gz: .*x"),
    "an edge to nothing": (broken_csv("edge", first("1,")), r"raw/edge\.csv\.gz: .*a number is missing"),
    "an edge too few": (broken_csv("edge", lambda lines: lines[1:]), r"raw/edge\.csv\.gz: 199 rows, 200 expected"),
    "an edge too many": (broken_csv("edge", lambda lines: [*lines, "0,1"]), r"edge\.csv\.gz: 201 rows or more, 200"),
    "edges cut off": (cut_off("edge.csv.gz"), r"raw/edge\.csv\.gz: "),
    "features cut off": (cut_off("node-feat.csv.gz"), r"raw/node-feat\.csv\.gz: "),
    "a row of features too few": (broken_csv("node-feat", lambda lines: lines[1:]), "59 rows, 60 expected"),
    "a label too many": (broken_csv("node-label", lambda lines: [*lines, "1"]), r"label\.csv\.gz: 61 labels for 60"),
    "a label out of range": (broken_csv("node-label", first("40")), "node 0: class 40 is .*num_classes: 40"),
    "a label below": (broken_csv("node-label", first("-2")), r"label\.csv\.gz, node 0: class -2 is out of range"),
    "half a label": (broken_csv("node-label", first("1.5")), r"label\.csv\.gz, node 0: 1\.5 is not a class"),
    "a split out of range": (broken_csv("valid", first("60")), r"split/time/valid\.csv\.gz: node 60 is out of range"),
    "a node in two splits": (broken_csv("test", first(str(Truth("").ids["train"][0]))), r"test\.csv\.gz: .*two splits"),
    "a split node without a label": (broken_csv("node-label", lambda lines: ["1", *["nan"] * (N - 1)]), "has no label"),
    "two graphs": (broken_csv("num-node-list", lambda lines: ["30", "30"]), r"node-list\.csv\.gz: .*found those of 2"),
    "no gzip": (lambda folder: (folder / "raw" / "edge.csv.gz").write_text("1,2\n"), r"edge\.csv\.gz: not a whole"),
    "an empty file": (lambda folder: (folder / "raw" / "node-feat.csv.gz").write_bytes(b""), r"node-feat\.csv\.gz: "),
}  # fmt: skip


def replaced(**arrays: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "raw" / "data.npz"
        np.savez_compressed(path, **{**np.load(path), **arrays})

    return apply


def damaged(folder: Path) -> None:
    """Another value, in a file that keeps its checksum of the one before."""
    path = folder / "raw" / "data.npz"
    np.savez(path, **dict(np.load(path)))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("node_feat.npy").header_offset + 1000
    content[at] ^= 1
    path.write_bytes(bytes(content))


MALFORMED_NPZ = {
    "features of integers": (replaced(node_feat=np.ones((N, F), int)), "node_feat: rows of floats .*found int64"),
    "features column by column": (replaced(node_feat=np.ones((N, F), order="F")), "node_feat: .*in Fortran's order"),
    "edges of floats": (replaced(edge_index=np.ones((2, M))), r"edge_index: two rows of integers .*float64"),
    "edges as pairs": (replaced(edge_index=np.ones((M, 2), int)), r"edge_index: .*shape \(200, 2\)"),
    "objects": (replaced(node_feat=np.array([[None]])), "node_feat: .*Python objects are not read"),
    "cut off": (cut_off("data.npz"), r"raw/data\.npz: node_feat: not a whole"),
    "damaged": (damaged, r"raw/data\.npz: node_feat: .*CRC"),
    "labels cut off": (cut_off("node-label.npz"), r"raw/node-label\.npz: node_label: not a whole"),
}


MALFORMED = {"ogbn-arxiv": MALFORMED_CSV, "ogbn-papers100M": MALFORMED_NPZ}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in MALFORMED.items() for case in cases])
def test_malformed_files(name: str, case: str, tmp_path: Path) -> None:
    change, message = MALFORMED[name][case]
    folder = write_folder(tmp_path, name)
    read_all(name, tmp_path)
    change(folder)
    with pytest.raises(InputError, match=message):
        read_all(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ogbn-proteins", "112 labels"), ("ogbn-mag", "several types"), ("cora", "unknown. It is one of ogbn-arxiv, ")],
)
def test_other_datasets_are_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"source.name: {name}: .*{reason}"):
        open_ogb(OgbConfig(name=name))


def without_ogb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ogb", "ogb.utils", "ogb.utils.url"):
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_files_without_ogb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ogb(monkeypatch)
    with pytest.raises(InputError) as refusal:
        open_ogb(OgbConfig(name="ogbn-products", root=str(tmp_path)))
    for part in (
        "ogbn_products: raw/edge.csv.gz, raw/node-feat.csv.gz", "split/sales_ranking/test.csv.gz missing",
        "http://snap.stanford.edu/ogb/data/nodeproppred/products.zip", "pip install 'rbm-dist[ogb]'",
    ):  # fmt: skip
        assert part in str(refusal.value)


def test_an_incomplete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "ogbn-arxiv")
    (folder / "raw" / "edge.csv.gz").unlink()
    with pytest.raises(InputError, match=r"ogbn_arxiv: raw/edge\.csv\.gz missing\. Unpack http.*arxiv\.zip"):
        open_ogb(OgbConfig(name="ogbn-arxiv", root=str(tmp_path)))


def fake_ogb(monkeypatch: pytest.MonkeyPatch, download_url: Callable[[str, str], str]) -> None:
    def extract_zip(path: str, folder: str) -> None:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)

    url = ModuleType("ogb.utils.url")
    url.__dict__.update(download_url=download_url, extract_zip=extract_zip)
    for name, module in (("ogb", ModuleType("ogb")), ("ogb.utils", ModuleType("ogb.utils")), ("ogb.utils.url", url)):
        monkeypatch.setitem(sys.modules, name, module)


def test_fetched_by_ogb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "made", "ogbn-arxiv")

    def download_url(url: str, target: str) -> str:
        assert url == "http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip"
        path = Path(target) / "arxiv.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.gz"):
                archive.write(file, Path("arxiv") / file.relative_to(folder))
        return str(path)

    fake_ogb(monkeypatch, download_url)
    root = tmp_path / "new" / "root"
    read_all("ogbn-arxiv", root)
    assert [path.name for path in root.iterdir()] == ["ogbn_arxiv"]
    fake_ogb(monkeypatch, lambda url, target: pytest.fail("fetched twice"))
    read_all("ogbn-arxiv", root)


def test_a_failed_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_url(url: str, target: str) -> str:
        raise OSError("no route to host")

    fake_ogb(monkeypatch, download_url)
    with pytest.raises(InputError, match=r"arxiv\.zip cannot be fetched: no route to host\. Unpack"):
        open_ogb(OgbConfig(name="ogbn-arxiv", root=str(tmp_path / "root")))
    assert list((tmp_path / "root").iterdir()) == []
