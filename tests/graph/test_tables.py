"""Tables: the same graph from every format and kind of id, and one clear message for each thing that is wrong."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph import node_ids, table_files, tables
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.graph.streamed import StreamedSource
from rbm_dist.graph.tables import open_tables
from rbm_dist.source_config import TablesConfig

Table = dict[str, list[Any]]
SPLITS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST, None: NO_SPLIT}
INTEGERS = st.integers(-(2**63), 2**63 - 1)
NAMES = st.text("aé😀-,\"' 0", max_size=11).map("n{}".format)


def put(url: str, content: bytes) -> None:
    fs, path = storage.filesystem(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, content)


def save(url: str, table: Table, row_group_size: int = 3) -> None:
    """Write a table as the format that the URL's suffix tells."""
    sink = pa.BufferOutputStream()
    arrow = pa.table(table)
    if ".csv" in url:
        pa.csv.write_csv(arrow, sink)
    else:
        pq.write_table(arrow, sink, row_group_size=row_group_size)
    content = sink.getvalue().to_pybytes()
    put(url, gzip.compress(content) if url.endswith(".gz") else content)


def save_npy(url: str, array: np.ndarray) -> None:
    storage.write_array(url, array)


def rows(table: Table, start: int, stop: int) -> Table:
    return {name: column[start:stop] for name, column in table.items()}


def nodes() -> Table:
    return {
        "id": [30, 10, 20, 40], "label": [0, 1, None, 1], "split": ["train", "val", None, "test"],
        "x": [0.5, 1.5, 2.5, 3.5], "y": [1, 2, 3, 4], "note": ["a", "b", "c", "d"],
    }  # fmt: skip


def edges() -> Table:
    return {"src": [30, 10, 20], "dst": [10, 20, 20]}


def opened(folder: Path | str, node_table: Table, edge_table: Table, suffix: str = "parquet", **config: Any):  # type: ignore[no-untyped-def]
    save(f"{folder}/nodes.{suffix}", node_table)
    save(f"{folder}/edges.{suffix}", edge_table)
    return open_tables(
        TablesConfig(nodes=f"{folder}/nodes.{suffix}", edges=f"{folder}/edges.{suffix}", **config), f"{folder}/scratch"
    )


def read_all(source: StreamedSource) -> tuple[list[tuple[Any, Any]], np.ndarray]:
    """Edges as pairs of the caller's ids, sorted, and features `[N, F]`, through every piece."""
    ids = source.nodes().orig_id
    pairs = []
    for piece in range(source.num_edge_pieces):
        for src, dst in source.edges(piece):
            pairs += list(zip(ids[src].tolist(), ids[dst].tolist(), strict=True))
    feat = []
    for piece, size in enumerate(np.diff(source.feat_offsets)):
        chunks = list(source.feat(piece))
        assert sum(map(len, chunks)) == size
        feat += chunks
    return sorted(pairs), np.concatenate(feat)


def bytes_of(node_id: Any) -> Any:
    return node_id.encode() if isinstance(node_id, str) else node_id


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Table, Table]:
    ids = draw(st.lists(draw(st.sampled_from([INTEGERS, NAMES])), min_size=1, max_size=12, unique=True))
    num = len(ids)

    def column(values: st.SearchStrategy) -> list[Any]:
        return draw(st.lists(values, min_size=num, max_size=num))

    classes = draw(st.sampled_from([[0, 1, 2], ["physics", "Ärzte", "cs"]]))
    label = [classes[0], *column(st.sampled_from([*classes, None]))[1:]]
    split = column(st.sampled_from(list(SPLITS)))
    table = {"id": ids, "label": label, "split": [s if c is not None else None for s, c in zip(split, label)]}  # noqa: B905
    for name in ("b", "a", "c"):
        table[name] = column(st.floats(-1e6, 1e6, width=32))
    pairs = draw(st.lists(st.tuples(st.sampled_from(ids), st.sampled_from(ids)), max_size=30))
    return table, {"src": [src for src, _ in pairs], "dst": [dst for _, dst in pairs]}


def save_all(folder: str, suffix: str, table: Table, edge_table: Table, cuts: tuple[int, int]) -> dict[str, str]:
    """A graph in several files each, the node table cut at `cuts[0]`, the edges at `cuts[1]`."""
    types = dict.fromkeys("bac", pa.float64()) | {"split": pa.string()}
    types["label"] = pa.string() if isinstance(table["label"][0], str) else pa.int64()
    for kind, content, cut in (("nodes", table, cuts[0]), ("edges", edge_table, cuts[1])):
        for number, part in ((2, rows(content, 0, cut)), (10, rows(content, cut, 10**6))):
            if suffix != "npy":
                columns = {name: pa.array(values, types.get(name)) for name, values in part.items()}
                of_ids = pa.string() if isinstance(table["id"][0], str) else pa.int64()
                columns |= {name: columns[name].cast(of_ids) for name in ("id", "src", "dst") if name in columns}
                save(f"{folder}/{kind}/part-{number}.{suffix}", columns)
            elif kind == "edges":
                of_ids = "U" if isinstance(table["id"][0], str) else np.int64
                array = np.array([part["src"], part["dst"]], of_ids)
                # [2, m] or [m, 2]; with an odd cut they are not both [2, 2].
                save_npy(f"{folder}/edges/part-{number}.npy", array.T if cut % 2 else array)
            else:
                feat = np.array([part["b"], part["a"], part["c"]], np.float32).T
                save_npy(f"{folder}/nodes/feat-{number}.npy", feat)
    if suffix == "npy":
        save_npy(f"{folder}/nodes/id.npy", np.array(table["id"]))
        label = ["" if each is None else each for each in table["label"]]
        if not isinstance(table["label"][0], str):
            label = [-1 if each is None else each for each in table["label"]]
        save_npy(f"{folder}/nodes/label.npy", np.array(label))
        save_npy(f"{folder}/nodes/split.npy", np.array([each or "" for each in table["split"]]))
    return {"nodes": f"{folder}/nodes", "edges": f"{folder}/edges"}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graphs(), cuts=st.tuples(st.integers(0, 12), st.integers(0, 30)))
@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz", "npy"])
def test_every_format_gives_the_graph_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, suffix: str, graph: Any, cuts: Any
) -> None:
    for module, name in ((table_files, "PIECE_ROWS"), (tables, "_EDGES"), (tables, "_NODES"), (tables, "_VALUES")):
        monkeypatch.setattr(module, name, 4)
    table, edge_table = graph
    folder = str(tmp_path_factory.mktemp("tables"))
    config = TablesConfig(**save_all(folder, suffix, table, edge_table, cuts), num_classes=3, undirected=False)
    source = open_tables(config, f"{folder}/scratch")
    pairs, feat = read_all(source)
    ids = [bytes_of(node_id) for node_id in table["id"]]
    assert source.nodes().orig_id.tolist() == ids
    written = zip(map(bytes_of, edge_table["src"]), map(bytes_of, edge_table["dst"]), strict=True)
    assert pairs == sorted(written)
    np.testing.assert_array_equal(feat, np.array([table["b"], table["a"], table["c"]], np.float32).T)
    names = sorted({each for each in table["label"] if each is not None}) if isinstance(table["label"][0], str) else []
    number = {name: rank for rank, name in enumerate(names)} or {0: 0, 1: 1, 2: 2}
    assert source.nodes().label.tolist() == [number.get(each, -1) for each in table["label"]]
    assert source.nodes().split.tolist() == [SPLITS[each] for each in table["split"]]
    assert (source.num_nodes, source.num_features, source.num_classes) == (len(ids), 3, 3)
    assert not source.undirected
    again = open_tables(config, f"{folder}/scratch")
    assert read_all(again)[0] == pairs
    np.testing.assert_array_equal(read_all(again)[1], feat)


@pytest.mark.parametrize("suffix", ["parquet", "csv.gz", "npy"])
def test_tables_are_read_from_any_storage(url: str, suffix: str) -> None:
    table = {name: nodes()[name] for name in ("id", "label", "split")} | {name: nodes()["x"] for name in "bac"}
    config = TablesConfig(**save_all(url, suffix, table, edges(), (1, 2)))
    put(f"{url}/nodes/_SUCCESS", b"")
    source = open_tables(config, f"{url}/scratch")
    assert read_all(source)[0] == [(10, 20), (20, 20), (30, 10)]
    assert source.nodes().label.tolist() == [0, 1, -1, 1]
    np.testing.assert_array_equal(read_all(source)[1], np.array([nodes()["x"]] * 3).T)


def test_only_the_first_to_open_reads_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, nodes(), edges())
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_derive", lambda *_: pytest.fail("the nodes are read again"))
        config = TablesConfig(nodes=f"{tmp_path}/nodes.parquet", edges=f"{tmp_path}/edges.parquet")
        assert read_all(open_tables(config, f"{tmp_path}/scratch"))[0] == [(10, 20), (20, 20), (30, 10)]
    changed = opened(tmp_path, nodes() | {"id": [31, 10, 20, 40]}, edges() | {"src": [31, 10, 20]})
    assert read_all(changed)[0] == [(10, 20), (20, 20), (31, 10)]


def test_row_numbers_need_no_ids_and_no_index(tmp_path: Path) -> None:
    table = {name: column for name, column in nodes().items() if name != "id"}
    edge_table = {"src": [0, 1, 2], "dst": [1, 2, 3]}
    for config in ({"id": None}, {}):
        save_npy(f"{tmp_path}/arrays/feat.npy", np.array([nodes()["x"]]).T)
        save_npy(f"{tmp_path}/arrays/label.npy", np.array([[0.0], [1.0], [np.nan], [1.0]]))  # as ogb's papers has them
        save(f"{tmp_path}/arrays.csv", edge_table)
        by_npy = TablesConfig(nodes=f"{tmp_path}/arrays", edges=f"{tmp_path}/arrays.csv", **config)
        assert open_tables(by_npy, f"{tmp_path}/scratch").nodes().label.tolist() == [0, 1, -1, 1]
        assert open_tables(by_npy, f"{tmp_path}/scratch").nodes().split is None
    for source in (opened(tmp_path, table, edge_table, id=None), open_tables(by_npy, f"{tmp_path}/scratch")):
        assert source.nodes().orig_id.tolist() == [0, 1, 2, 3]
        assert read_all(source)[0] == [(0, 1), (1, 2), (2, 3)]
    assert not list(tmp_path.glob("scratch/*/key.npy"))


def test_which_columns_are_features(tmp_path: Path) -> None:
    table = nodes() | {"v": pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.float16(), 2))}
    table |= {"w": [[1.5], [2.5], [3.5], [4.5]], "z": [True, False, True, False]}
    source = opened(tmp_path, table, edges())
    np.testing.assert_array_equal(read_all(source)[1][1], [1.5, 2, 3, 4, 2.5, 0])
    assert source.num_features == 6
    for index, (features, row) in enumerate(((("w", "x"), [2.5, 1.5]), (("v",), [3, 4]))):
        source = opened(tmp_path / str(index), table, edges(), features=features)
        np.testing.assert_array_equal(read_all(source)[1][1], row)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["1", "0", "", "2"], [1, 0, -1, 2]),
        (["1.0", "0.0", "NaN", "2.0"], [1, 0, -1, 2]),
        (["10", "b", "9", "NA"], [0, 2, 1, -1]),
        ([1.0, 0.0, float("nan"), None], [1, 0, -1, -1]),
        ([True, False, None, True], [1, 0, -1, 1]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), [1, 0, -1, 1]),
        (pa.array([1, 0, None, 2], pa.uint8()), [1, 0, -1, 2]),
    ],
)
def test_labels_are_numbers_or_names(tmp_path: Path, column: Any, expected: list[int]) -> None:
    table = nodes() | {"label": column, "split": [None] * 4}
    source = opened(tmp_path, table, edges())
    assert source.nodes().label.tolist() == expected
    assert source.num_classes == max(expected) + 1


def test_csv_types_do_not_depend_on_where_a_file_begins(tmp_path: Path) -> None:
    """A file may hold whole numbers where another has fractions, and no label at all."""
    put(f"{tmp_path}/nodes/0.csv", b"id,label,x\n1,,1\n2,,2\n")
    put(f"{tmp_path}/nodes/1.csv", b"id,label,x\na1,1,0.5\n07,0,3\n")
    put(f"{tmp_path}/nodes/2.csv", b"id,label,x\n")
    put(f"{tmp_path}/edges.csv", b"src,dst\n1,2\n07,1\n")
    source = open_tables(TablesConfig(nodes=f"{tmp_path}/nodes/*.csv", edges=f"{tmp_path}/edges.csv"), f"{tmp_path}/s")
    assert source.nodes().orig_id.tolist() == [b"1", b"2", b"a1", b"07"]
    assert source.nodes().label.tolist() == [-1, -1, 1, 0]
    assert read_all(source)[0] == [(b"07", b"1"), (b"1", b"2")]
    np.testing.assert_array_equal(read_all(source)[1], [[1], [2], [0.5], [3]])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f8", "<i2", "S3", "?"])
def test_rows_of_an_array_are_sliced_in_every_layout(tmp_path: Path, dtype: str, order: Any, axis: int) -> None:
    array = np.arange(30).reshape((10, 3) if axis == 0 else (3, 10)).astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    rows_n3 = table_files.NpyArray(f"{tmp_path}/a.npy", axis).read(4, 9)
    np.testing.assert_array_equal(rows_n3, (array if axis == 0 else array.T)[4:9])
    assert rows_n3.dtype.isnative


def test_a_type_that_changes_late_in_a_csv_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_CSV_BYTES", 32)
    save(f"{tmp_path}/edges.csv", edges())
    for line, reason in (("5,0,one", "double: invalid value 'one'"), ("five,0,1", "int64: invalid value 'five'")):
        put(
            f"{tmp_path}/nodes.csv",
            ("id,label,x\n" + "".join(f"{row + 10},0,1\n" for row in range(20)) + line).encode(),
        )
        config = TablesConfig(nodes=f"{tmp_path}/nodes.csv", edges=f"{tmp_path}/edges.csv")
        with pytest.raises(InputError, match=rf"nodes.csv: cannot be read: In CSV column #.: Row #22: .*{reason}"):
            _ = [list(open_tables(config, f"{tmp_path}/scratch").feat(0)) for _ in range(2)]


def test_strings_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, salts = node_ids._hashes, []

    def poor(words: np.ndarray, salt: np.uint64) -> np.ndarray:
        salts.append(int(salt))
        return hashes(words, salt) if salt else words[:, 0] % np.uint64(2)

    monkeypatch.setattr(node_ids, "_hashes", poor)
    ids = np.array([b"d", b"b", b"a", b"c-and-more"])
    index = node_ids.index(ids, str)
    assert salts == [0, 1]
    row, unknown = index.rows(np.array([b"c-and-more", b"b", b"c-and-more-still", b"x"]))
    assert row[:2].tolist() == [3, 1]
    assert unknown.tolist() == [False, False, True, True]
    with pytest.raises(InputError, match=r"3: the node id 'd' is also that of 0"):
        node_ids.index(np.array([b"d", b"b", b"a", b"d"]), str)


def with_nodes(**columns: Any) -> Callable[[str], None]:
    return lambda folder: save(f"{folder}/nodes.parquet", nodes() | columns)


def with_edges(**columns: Any) -> Callable[[str], None]:
    return lambda folder: save(f"{folder}/edges.parquet", {**edges(), **columns})


def named(*ids: str) -> Callable[[str], None]:
    def write(folder: str) -> None:
        with_nodes(id=ids)(folder)
        with_edges(src=["a"] * 3, dst=["b"] * 3)(folder)

    return write


def without(*names: str) -> Callable[[str], None]:
    return lambda folder: save(
        f"{folder}/nodes.parquet", {name: values for name, values in nodes().items() if name not in names}
    )


def two_files(**columns: Any) -> Callable[[str], None]:
    def write(folder: str) -> None:
        save(f"{folder}/n/0.parquet", rows(nodes(), 0, 2))
        second = {**rows(nodes(), 2, 4), **columns}
        save(f"{folder}/n/1.parquet", {name: values for name, values in second.items() if values is not None})

    return write


def text(name: str, content: str) -> Callable[[str], None]:
    return lambda folder: put(f"{folder}/{name}", content.encode())


def npy(feat: np.ndarray, label: Any, links: Any = ((0,), (1,)), **arrays: Any) -> Callable[[str], None]:
    def write(folder: str) -> None:
        for name, array in {"feat": feat, "label": label, **arrays}.items():
            np.save(f"{folder}/a-{name}.npy", np.asarray(array))
            put(f"{folder}/a/{name}.npy", Path(f"{folder}/a-{name}.npy").read_bytes())
        np.save(f"{folder}/links.npy", np.asarray(links))

    return write


def cut_off(folder: str) -> None:
    npy(np.zeros((4, 2)), [0, 1, 0, 1])(folder)
    put(f"{folder}/a/feat.npy", Path(f"{folder}/a/feat.npy").read_bytes()[:-8])


def cut_gzip(folder: str) -> None:
    save(f"{folder}/e.csv.gz", {"src": list(range(10_000)), "dst": list(range(10_000))})
    put(f"{folder}/e.csv.gz", Path(f"{folder}/e.csv.gz").read_bytes()[:-100])


def mixed(folder: str) -> None:
    save(f"{folder}/m/0.parquet", nodes())
    save(f"{folder}/m/1.csv", nodes())


TWO, CSV = {"nodes": "n"}, {"nodes": "nodes.csv"}
NPY = {"nodes": "a", "edges": "links.npy"}
FOUR = np.zeros((4, 2))
WRONG: dict[str, tuple[Callable[[str], None], dict[str, Any], str]] = {
    "no nodes": (with_nodes(), {"nodes": "other.parquet"}, r"other.parquet: no such file \(source.nodes\)"),
    "no edges": (with_nodes(), {"edges": "e/*.csv"}, r"e/\*.csv: no such file \(source.edges\)"),
    "an unknown format": (text("nodes.txt", "id"), {"nodes": "nodes.txt"}, "nodes.txt: unknown format; .*parquet"),
    "mixed formats": (mixed, {"nodes": "m"}, r"m: Parquet and CSV files are mixed \(0.parquet, 1.csv\)"),
    "not Parquet": (text("nodes.parquet", "id"), {}, "nodes.parquet: cannot be read: "),
    "an empty file": (text("nodes.csv", ""), CSV, "nodes.csv: cannot be read: Empty CSV file"),
    "not gzip": (text("n.csv.gz", "id"), {"nodes": "n.csv.gz"}, "n.csv.gz: cannot be read: "),
    "cut off gzip": (cut_gzip, {"edges": "e.csv.gz"}, "e.csv.gz: cannot be read: .*end-of-stream"),
    "lines of two lengths": (
        text("nodes.csv", "id,label,x\n1,0,1\n2,0\n"), CSV, "nodes.csv: cannot be read: .*Expected 3 columns, got 2"
    ),
    "a column twice": (text("nodes.csv", "id,label,x,x\n1,0,1,1\n"), CSV, "nodes.csv: column 'x' is there twice"),
    "no rows": (text("nodes.csv", "id,label,x\n"), CSV, "nodes.csv: no columns of numbers for features"),
    "no rows of Parquet": (
        lambda folder: pq.write_table(pa.table(nodes()).slice(0, 0), f"{folder}/nodes.parquet"),
        {}, "nodes.parquet: the node table is empty",
    ),
    "no id": (without("id"), {}, r"nodes.parquet: no column 'id' \(source.id; null: .*\); found label, split, x"),
    "no label": (without("label"), {}, r"no column 'label' \(source.label\); found id, split"),
    "no named split": (with_nodes(), {"split": "mask"}, r"no column 'mask' \(source.split\)"),
    "no named feature": (with_nodes(), {"features": ("x", "q")}, r"no column 'q' \(source.features\)"),
    "a feature of text": (with_nodes(), {"features": ("note",)}, "column 'note': numbers or .*, found string"),
    "no features": (without("x", "y"), {}, r"no columns of numbers for features \(source.features\); found id"),
    "lists of none": (with_nodes(v=pa.array([[]] * 4, pa.list_(pa.int8()))), {"features": ("v",)}, "have no features"),
    "no src": (with_edges(), {"src": "from"}, r"edges.parquet: no column 'from' \(source.src\); found src, dst"),
    "src of text": (with_edges(src=["a", "b", "c"]), {}, r"'src' is string, but node ids are integers \(source.src\)"),
    "dst of numbers": (
        with_nodes(id=["a", "b", "c", "d"]), {}, r"'src' is int64, but node ids are strings \(source.src\)"
    ),
    "src of floats": (with_edges(src=[1.0, 2.0, 3.0]), {"id": None}, "'src' is double, but node ids are row numbers"),
    "ids of floats": (with_nodes(id=[1.0, 2.0, 3.0, 4.0]), {}, "column 'id': integers or strings .*, found double"),
    "another type": (two_files(x=[1, 2]), TWO, "n/1.parquet: column 'x' is int64, but double in .*n/0.parquet"),
    "another column": (two_files(q=[1, 2]), TWO, "n/1.parquet: column 'q' is int64, but not there in .*n/0.parquet"),
    "a column less": (two_files(y=None), TWO, "n/1.parquet: column 'y' is not there, but int64 in"),
    "a label less": (two_files(label=None), TWO, "n/1.parquet: no column 'label'"),
    "an id twice": (two_files(id=[20, 10]), TWO, "n/1.parquet: row 1: .* 10 is also that of .*0.parquet: row 1"),
    "a name twice": (named("a", "b", "é", "é"), {}, "row 3: the node id 'é' is also that of .*row 2"),
    "no id in a row": (with_nodes(id=[1, None, 3, 4]), {}, "nodes.parquet: row 1, column id: the id is missing"),
    "an empty name": (named("a", "b", "", "d"), {}, "nodes.parquet: row 2, column id: the id is missing"),
    "an unknown name": (
        lambda folder: [named(*"abcd")(folder), with_edges(src=["a"] * 3, dst=["b", "b" * 20, "B"])(folder)],
        {}, "row 1, column dst: no node has the id 'bbbbbbbbbbbbbbbbbbbb', and 2 of these 3 ids",
    ),
    "a zero byte": (named("a", "bb\0", "c", "d"), {}, "row 1, column id: the id holds a zero byte"),
    "a long name": (named("a", "b" * 1025, "c", "d"), {}, "row 1, column id: an id of 1,025 bytes"),
    "an id of 64 bits": (with_nodes(id=pa.array([1, 2, 3, 2**63], pa.uint64())), {}, "column id: an id is beyond 63"),
    "an unknown id": (
        with_edges(dst=[10, 99, 98]), {},
        r"edges.parquet: row 1, column dst: no node has the id 99, and 2 of these 3 ids are of no node \(.*nodes.parq",
    ),
    "a missing end": (with_edges(src=[10, 20, None]), {}, "edges.parquet: row 2, column src: the id is missing"),
    "a row too far": (with_edges(src=[0, 4, 1], dst=[0, 1, 2]), {"id": None}, "row 1, column src: no node has .* 4"),
    "text among numbers": (
        text("edges.csv", "src,dst\n10,20\n10,x\n"), {"edges": "edges.csv"}, "edges.csv: column 'dst' is string, but"
    ),
    "a NaN": (with_nodes(x=[1.0, float("nan"), 1.0, 1.0]), {}, "row 1, column x: the feature is missing"),
    "an infinity": (two_files(x=[1.0, float("-inf")]), TWO, "n/1.parquet: row 1, column x: the feature .*infinite"),
    "beyond float32": (with_nodes(x=[1.0, 1.0, 1.0, 1e39]), {}, "row 3, column x: .*beyond float32"),
    "a missing number": (with_nodes(y=[1, 2, None, 4]), {}, "row 2, column y: the feature is missing"),
    "a missing list": (with_nodes(v=[[1.0, 2.0], None] * 2), {"features": ("v",)}, "row 1, column v: 0 features, 2 in"),
    "a short list": (with_nodes(v=[[1.0, 2.0], [1.0]] * 2), {"features": ("v",)}, "row 1, column v: 1 features, 2 in"),
    "a NaN in a list": (with_nodes(v=[[1.0], [None]] * 2), {}, r"row 1, column v: the feature is missing"),
    "a feature of another kind": (
        text("nodes.csv", "id,label,x\n10,0,1\n20,1,\n30,0,2\n"), CSV, "nodes.csv: row 1, column x: the feature is"
    ),
    "a label below -1": (with_nodes(label=[0, 1, -2, 1]), {}, "row 2, column label: class -2 is out of range"),
    "half a label": (with_nodes(label=[0, 1, 0.5, 1]), {}, "row 2, column label: classes are whole .* found 0.5"),
    "a gap in the labels": (with_nodes(label=[0, 2, 0, 2]), {}, "class 2 occurs but class 1 does not"),
    "beyond num_classes": (with_nodes(), {"num_classes": 1}, "row 1, column label: class 1 is out of range for .*: 1"),
    "more names": (with_nodes(label=list("abcd")), {"num_classes": 3}, r"4 classes \(a, b, c, d .*num_classes is 3"),
    "no labels": (with_nodes(label=[None] * 4, split=[None] * 4), {}, "column label: no node has a label"),
    "dates": (with_nodes(label=pa.array([1] * 4, pa.date32())), {}, "column 'label': classes.*, found date32"),
    "another split": (with_nodes(split=["train", "dev"] * 2), {}, "row 1, column split: train, val or .* found 'dev'"),
    "another code": (with_nodes(split=[0, 1, 2, 3]), {}, r"row 3, column split: 0 \(train\).*, found 3"),
    "a split of floats": (with_nodes(split=[0.5] * 4), {}, "column 'split': train, val or test expected, found double"),
    "a split without label": (with_nodes(split=["train"] * 4), {}, "row 2, column split: .* has no label"),
    "no feat*.npy": (npy(FOUR, [0, 1, 0, 1]), NPY | {"features": ("x",)}, r"a: no x\*.npy; found feat.npy, label.npy"),
    "fewer labels": (npy(FOUR, [0, 1, 0]), NPY, r"label.npy: 3 rows, but feat\*.npy have 4"),
    "no label.npy": (npy(FOUR, [0]), NPY | {"label": "cls"}, "feat.npy: no column 'cls'"),
    "a tensor": (npy(np.zeros((4, 2, 2)), [0, 1, 0, 1]), NPY, r"feat.npy: an array of rows .*\(4, 2, 2\)"),
    "pickles": (npy(np.array([{}] * 4), [0, 1, 0, 1]), NPY, "feat.npy: cannot be read: .*found dtype object"),
    "complex": (npy(FOUR * 1j, [0, 1, 0, 1]), NPY, "feat.npy: cannot be read: .*found dtype complex128"),
    "cut off": (cut_off, NPY, "feat.npy: cut off"),
    "three ends": (npy(FOUR, [0, 1, 0, 1], np.zeros((3, 4), int)), NPY, r"links.npy: .*\[2, m\].*\(3, 4\)"),
    "a list of ends": (npy(FOUR, [0, 1, 0, 1], [0, 1]), NPY, r"links.npy: .*\[2, m\].*\(2,\)"),
    "links of floats": (npy(FOUR, [0, 1, 0, 1], np.zeros((2, 4))), NPY, "links.npy: column 'src' is double, but"),
    "a long link": (npy(FOUR, [0, 1, 0, 1], [[0], [4]]), NPY, "links.npy: row 0, column dst: no node has the id 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(tmp_path: Path, case: str) -> None:
    write, config, reason = WRONG[case]
    save(f"{tmp_path}/nodes.parquet", nodes())
    save(f"{tmp_path}/edges.parquet", edges())
    write(str(tmp_path))
    config = {"nodes": "nodes.parquet", "edges": "edges.parquet"} | config
    config |= {name: f"{tmp_path}/{config[name]}" for name in ("nodes", "edges")}
    with pytest.raises(InputError) as caught:
        read_all(open_tables(TablesConfig(**config), f"{tmp_path}/scratch"))
    message = str(caught.value)
    assert re.search(reason, message), message
    assert message.startswith(f"{tmp_path}/")
    assert "\n" not in message


def test_a_column_has_one_use() -> None:
    with pytest.raises(ValueError, match="column 'y' is named for two things"):
        TablesConfig(nodes="n", edges="e", label="y", features=("x", "y"))
