"""Tables: the same graph from every format and kind of id."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.shards import IdType
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources import node_ids, pieces, tables
from rbm_dist.sources.npy_files import NpyArray
from rbm_dist.sources.tables import open_tables
from tests.sources.table_input import Table, edges, nodes, opened, put, read_all, rows, save, save_npy

SPLITS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST, None: NO_SPLIT}
TEXT = IdType("text", "string")
INTEGERS = st.integers(-(2**63), 2**63 - 1)
NAMES = st.text("aé😀-,\"' 0", max_size=11).map("n{}".format)


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
    monkeypatch.setattr(pieces, "PIECE_ROWS", 4)
    for name in ("_EDGES", "_NODES", "_VALUES", "_WIDE_ROWS"):
        monkeypatch.setattr(tables, name, 4)
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


def test_what_a_table_of_new_nodes_is_read_by(tmp_path: Path) -> None:
    table = nodes() | {"colour": ["red", "blue", "red", None], "emb": [[1.0, 2.0]] * 4}
    save(str(tmp_path / "nodes.parquet"), table)
    save(str(tmp_path / "edges.parquet"), edges())
    config = TablesConfig(
        nodes=str(tmp_path / "nodes.parquet"), edges=str(tmp_path / "edges.parquet"), one_hot=("colour",),
        na_values=("?",), decimal=",",
    )  # fmt: skip
    said = open_tables(config, str(tmp_path / "scratch")).about.table
    assert said is not None
    columns = said.pop("columns")
    assert said == {"id": "id", "id_type": "auto", "na_values": ["?"], "thousands": None, "decimal": ","}
    assert [(each["name"], each["how"], each["width"]) for each in columns] == [
        ("x", "number", 1), ("y", "number", 1), ("colour", "one_hot", 2), ("emb", "list", 2),
    ]  # fmt: skip
    assert list(columns[2]["values"]) == ["blue", "red"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["1", "0", "", "2"], [1, 0, -1, 2]),
        (["1.0", "0.0", "NaN", "2.0"], [1, 0, -1, 2]),
        (["10", "b", "9", "NA"], [0, 3, 1, 2]),
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
    rows_n3 = NpyArray(f"{tmp_path}/a.npy", axis).read(4, 9)
    np.testing.assert_array_equal(rows_n3, (array if axis == 0 else array.T)[4:9])
    assert rows_n3.dtype.isnative


def test_strings_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, salts = node_ids._hashes, []

    def poor(words: np.ndarray, salt: np.uint64) -> np.ndarray:
        salts.append(int(salt))
        return hashes(words, salt) if salt else words[:, 0] % np.uint64(2)

    monkeypatch.setattr(node_ids, "_hashes", poor)
    ids = np.array([b"d", b"b", b"a", b"c-and-more"])
    index = node_ids.index(ids, TEXT, str)
    assert salts == [0, 1]
    row, unknown = index.rows(np.array([b"c-and-more", b"b", b"c-and-more-still", b"x"]))
    assert row[:2].tolist() == [3, 1]
    assert unknown.tolist() == [False, False, True, True]
    with pytest.raises(InputError, match=r"3: the node id 'd' is also that of 0"):
        node_ids.index(np.array([b"d", b"b", b"a", b"d"]), TEXT, str)
