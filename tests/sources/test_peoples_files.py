"""Files of tables as people have them: text of every kind, folders, types that differ; a look at them, and pandas."""

import decimal
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import TEST, TRAIN
from rbm_dist.sources import csv_files, node_ids
from rbm_dist.sources.table_look import summary_of_look
from rbm_dist.sources.tables import open_tables
from tests.sources.peoples_input import EDGES, NODES, left_out, opened, pairs, put_text
from tests.sources.pieces import read_features
from tests.sources.table_input import put, save


# -------------------------------------------------------------------------------------------------- text files
def test_line_breaks_within_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK", 1 << 12)
    note = "\n".join(["# lorem, ipsum"] * 20)
    table = pd.DataFrame({"id": range(300), "label": [0, 1] * 150, "note": [note] * 300, "x": np.arange(300) / 4})
    put_text(tmp_path / "nodes.csv", table.to_csv(index=False))
    put_text(tmp_path / "edges.csv", "src,dst\n0,299\n")
    source = opened(tmp_path, "nodes.csv", "edges.csv")
    np.testing.assert_array_equal(read_features(source)[:, 0], np.arange(300) / 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("edges.tsv", "src\tdst\n7\t8\n8\t10\n"),
        ("edges.csv", "src;dst;when\n7;8;a,b\n8;10;c\n"),
        ("edges.txt", "src|dst\n7|8\n8|10\n"),
        ("edges.txt", "# Directed graph: web.txt\n# Nodes: 4 Edges: 2\n# FromNodeId\tToNodeId\n7\t8\n8\t10\n"),
        ("edges.txt", "# comment\n\n7 8\n# another\n8 10\n"),
        ("edges.csv", "7,8,0.5\n8,10,1.5\n"),
        ("edges.txt", "#weight\tdst\tsrc\n1\t8\t7\n2\t10\t8\n"),
        ("edges.csv", "\ufeffsrc,dst\r\n7,8\r\n8,10\r\n"),
        ("edges.csv.gz", "src,dst\n7,8\n8,10\n"),
    ],
)
def test_edge_lists_as_they_are_found(tmp_path: Path, name: str, text: str) -> None:
    put(f"{tmp_path}/{name}", gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    save(f"{tmp_path}/nodes.csv", NODES)
    assert pairs(opened(tmp_path, "nodes.csv", name)) == [(7, 8), (8, 10)]


def test_a_delimiter_and_no_header_can_be_said(tmp_path: Path) -> None:
    put_text(tmp_path / "nodes.data", "7:0:0.5\n8:1:1.5\n9:0:2.5\n10:1:3.5\n")
    put_text(tmp_path / "edges.data", "7:8\n8:10\n")
    with pytest.raises(InputError, match=r"nodes.data: unknown format"):
        opened(tmp_path, "nodes.data", "edges.data")
    for name in ("nodes", "edges"):
        (tmp_path / f"{name}.data").rename(tmp_path / f"{name}.txt")
    with pytest.raises(InputError, match=r"no column 'id' .*source.delimiter"):
        opened(tmp_path, "nodes.txt", "edges.txt")
    with pytest.raises(InputError, match=r"no column 'id' .*source.header to false"):
        opened(tmp_path, "nodes.txt", "edges.txt", delimiter=":")
    source = opened(tmp_path, "nodes.txt", "edges.txt", delimiter=":", header=False, id=0, label=1)
    assert pairs(source) == [(7, 8), (8, 10)]
    assert read_features(source)[:, 0].tolist() == NODES["x"]


def test_an_encoding_can_be_said(tmp_path: Path) -> None:
    put_text(tmp_path / "nodes.csv", "id,label,x\nmüller,Ärzte,1\nb,x,2\n", "latin-1")
    put_text(tmp_path / "edges.csv", "src,dst\nb,müller\n", "latin-1")
    with pytest.raises(InputError, match=r"nodes.csv: cannot be read: .*source.encoding"):
        opened(tmp_path, "nodes.csv", "edges.csv")
    source = opened(tmp_path, "nodes.csv", "edges.csv", encoding="latin-1")
    assert (pairs(source), source.about.class_names) == ([("b", "müller")], ["x", "Ärzte"])


# ------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("label", pa.array([0, 1]), pa.array([1.0, None])),
        ("x", pa.array([1, 2], pa.int32()), pa.array([3, 4], pa.int64())),
        ("x", pa.array([1, 2], pa.uint8()), pa.array([0.5, 4], pa.float32())),
        ("x", pa.array([True, False]), pa.array([3, 4])),
        ("x", pa.array([decimal.Decimal("1.5"), decimal.Decimal(2)]), pa.array([0.5, 4.0])),
        ("x", pa.array([None, None], pa.null()), pa.array([0.5, 4.0])),
        ("label", pa.array(["a", "b"]), pa.array(["b", None], pa.large_string())),
        ("label", pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", None], pa.large_string())),
        ("x", pa.array([[1.0, 2.0]] * 2), pa.array([[3.0, 4.0]] * 2, pa.list_(pa.float32(), 2))),
        ("x", pa.array([[1, 2]] * 2), pa.array([[3.5, 4.0]] * 2, pa.large_list(pa.float64()))),
        ("id", pa.array([7, 8], pa.int32()), pa.array([9, 10], pa.int64())),
        ("id", pa.array(["7", "8"]), pa.array(["9", "10"], pa.large_string())),
    ],
    ids=lambda each: each if isinstance(each, str) else str(each.type),
)
def test_files_of_one_table_may_differ_in_types(tmp_path: Path, name: str, one: pa.Array, two: pa.Array) -> None:
    for file, (column, rows) in enumerate(((one, slice(0, 2)), (two, slice(2, 4)))):
        table = {key: values[rows] for key, values in NODES.items()} | {name: column}
        save(f"{tmp_path}/n/part-{file}.parquet", table)
    save(f"{tmp_path}/edges.csv", EDGES)
    source = opened(tmp_path, "n", "edges.csv", missing="zero")
    frame = pd.concat([pd.DataFrame({name: each.to_pylist()}) for each in (one, two)], ignore_index=True)
    if name == "x":
        wanted = np.array([np.ravel(each) for each in frame["x"]], np.float64)
        np.testing.assert_array_equal(read_features(source), wanted)
    elif name == "label":
        codes = {each: code for code, each in enumerate(sorted(frame["label"].dropna().unique()))}
        assert source.nodes().label.tolist() == [codes.get(each, -1) for each in frame["label"]]
    assert len(pairs(source)) == 2


def test_folders_within_folders(tmp_path: Path) -> None:
    parts = {"day=0/part-0.parquet": slice(0, 1), "day=0/part-1.parquet": slice(1, 2), "day=10/a.parquet": slice(2, 4)}
    for name, rows in parts.items():
        save(f"{tmp_path}/n/{name}", {key: values[rows] for key, values in NODES.items()})
    for name in ("_SUCCESS", "day=0/.part-0.parquet.crc", "_temporary/0.parquet", "day=10/empty.parquet"):
        put(f"{tmp_path}/n/{name}", b"")
    put_text(tmp_path / "n" / "README.md", "hello")
    for pattern in ("n", "n/*", "n/day=*/*.parquet"):
        source = opened(tmp_path, pattern)
        assert source.nodes().orig_id.tolist() == NODES["id"]
        assert source.num_features == 1
        assert left_out(source)["day"] == "said by the path, not in the files"
    assert left_out(opened(tmp_path, "n"))[f"{tmp_path}/n/README.md"] == "the file is no table"
    assert "1 empty" in opened(tmp_path, "n").about.notes["nodes"]
    np.testing.assert_array_equal(read_features(opened(tmp_path, "n", features=("day",)))[:, 0], [0, 0, 10, 10])


def test_a_path_can_say_the_split(tmp_path: Path) -> None:
    for split, rows in (("train", slice(0, 2)), ("test", slice(2, 4))):
        save(f"{tmp_path}/n/split={split}/0.csv", {key: values[rows] for key, values in NODES.items()})
    assert opened(tmp_path, "n").nodes().split.tolist() == [TEST, TEST, TRAIN, TRAIN]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"n/a.parquet": b"", "n/b.parquet": b""}, r"n: 2 files of no bytes"),
        ({"n/notes.md": b"x"}, r"n: no table in it, but notes.md; tables end in \.parquet"),
        ({"n/.hidden": b"x"}, r"n: no table in it"),
        ({}, r"n: no such file"),
    ],
)
def test_a_folder_without_tables_is_told_from_none(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    for name, content in files.items():
        put(f"{tmp_path}/{name}", content)
    with pytest.raises(InputError, match=rf"{reason}.*\(source.nodes\)"):
        opened(tmp_path, "n")


# ------------------------------------------------------------------------------------------- a look, and pandas
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_look_tells_what_reading_does(tmp_path: Path, suffix: str) -> None:
    table = NODES | {"label": ["a", "b", "a", "None"], "y": [4, 3, 2, 1], "note": ["p", "q", "r", "s"]}
    save(f"{tmp_path}/nodes.{suffix}", table)
    save(f"{tmp_path}/edges.{suffix}", EDGES)
    before = sorted(tmp_path.rglob("*"))
    config = TablesConfig(nodes=f"{tmp_path}/nodes.{suffix}", edges=f"{tmp_path}/edges.{suffix}")
    summary = summary_of_look(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert (summary["nodes"]["rows"], summary["edges"]["read"]) == (4, 2)
    assert summary["label"]["classes"] == [{"name": "a", "nodes": 2}, {"name": "b", "nodes": 1}]
    assert [(each["name"], each["min"], each["max"]) for each in summary["features"]] == [("x", 0.5, 3.5), ("y", 1, 4)]
    about = open_tables(config, f"{tmp_path}/s").about
    assert [(each["what"], each["why"]) for each in summary["left_out"]] == about.left_out
    assert [each["name"] for each in summary["features"]] == [name for name, _ in about.features or []]


COLUMNS = {
    "int": st.integers(-1000, 1000), "float": st.floats(-1e6, 1e6, width=32), "bool": st.booleans(),
    "with gaps": st.none() | st.floats(-1e6, 1e6, width=32), "with few": st.none() | st.integers(-1000, 1000),
    "text": st.text("ab ,;\"'\n#é", min_size=1, max_size=6).map("t{}".format),
}  # fmt: skip


@st.composite
def frames(draw: st.DrawFn) -> tuple[pd.DataFrame, list[int]]:
    """A node table of random columns in random order, and how many rows each of its files has."""
    num = draw(st.integers(1, 9))
    zeros = st.integers(0, 99).map("{:03d}".format)
    ids = draw(st.sampled_from([st.integers(-(2**40), 2**40), COLUMNS["text"], zeros]))
    columns = {"id": draw(st.lists(ids, min_size=num, max_size=num, unique=True))}
    columns["label"] = [0, *draw(st.lists(st.sampled_from([0, 1, None]), min_size=num - 1, max_size=num - 1))]
    for index, kind in enumerate(draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=4))):
        columns[f"c{index}"] = draw(st.lists(COLUMNS[kind], min_size=num, max_size=num))
    columns["always"] = [1.5] * num
    frame = pd.DataFrame({name: columns[name] for name in draw(st.permutations(sorted(columns)))})
    return frame, draw(st.lists(st.integers(0, num), min_size=0, max_size=2).map(sorted))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=frames(), delimiter=st.sampled_from([",", "\t", ";", "|"]))
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_is_read_is_what_pandas_reads(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, drawn: tuple[pd.DataFrame, list[int]], delimiter: str
) -> None:
    frame, cuts = drawn
    folder = tmp_path_factory.mktemp("tables")
    (folder / "n").mkdir()
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(frame)], strict=True)):
        part = frame.iloc[start:stop]
        if suffix == "parquet":
            part.to_parquet(folder / "n" / f"{number}.parquet", index=False)
        else:
            part.to_csv(folder / "n" / f"{number}.csv", index=False, sep=delimiter)
    first = frame["id"].iloc[0]
    pd.DataFrame({"src": [first], "dst": [first]}).to_csv(folder / "edges.csv", index=False)
    if suffix == "parquet" and isinstance(first, str):
        pd.DataFrame({"src": [first], "dst": [first]}).to_parquet(folder / "edges.parquet", index=False)
    edges = "edges.parquet" if (folder / "edges.parquet").exists() else "edges.csv"
    source = opened(folder, "n", edges, num_classes=2, missing="zero")
    back = node_ids.to_arrow(source.nodes().orig_id, source.about.id_type).to_pylist()
    assert back == frame["id"].tolist()
    assert source.nodes().label.tolist() == frame["label"].fillna(-1).astype(int).tolist()
    numeric = frame.drop(columns=["id", "label"]).select_dtypes(["number", "bool"])
    assert [name for name, _ in source.about.features or []] == numeric.columns.tolist()
    np.testing.assert_array_equal(read_features(source), numeric.to_numpy(np.float64).astype(np.float32))
    assert set(left_out(source)) == set(frame.columns) - set(numeric.columns) - {"id", "label"}
