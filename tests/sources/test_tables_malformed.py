"""Malformed tables: each is refused with a message that names the file, the row or column, and the reason."""

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import csv_files
from rbm_dist.sources.tables import open_tables
from tests.sources.table_input import edges, nodes, put, read_all, rows, save


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
    "an unknown format": (text("nodes.xlsx", "id"), {"nodes": "nodes.xlsx"}, "nodes.xlsx: unknown format; .*parquet"),
    "mixed formats": (mixed, {"nodes": "m"}, r"m: Parquet and CSV files are mixed \(0.parquet, 1.csv\)"),
    "not Parquet": (text("nodes.parquet", "id"), {}, "nodes.parquet: cannot be read: "),
    "an empty file": (text("nodes.csv", ""), CSV, r"nodes.csv: the file is empty \(source.nodes\)"),
    "not gzip": (text("n.csv.gz", "id"), {"nodes": "n.csv.gz"}, "n.csv.gz: cannot be read: "),
    "cut off gzip": (cut_gzip, {"edges": "e.csv.gz"}, "e.csv.gz: cannot be read: .*end-of-stream"),
    "lines of two lengths": (
        text("nodes.csv", "id,label,x\n1,0,1\n2,0\n"), CSV, "nodes.csv: cannot be read: .*Expected 3 columns, got 2"
    ),
    "a column twice": (text("nodes.csv", "id,label,x,x\n1,0,1,1\n"), CSV, "nodes.csv: column 'x' is there twice"),
    "no rows": (text("nodes.csv", "id,label,x\n"), CSV, "nodes.csv: the node table is empty"),
    "no rows of Parquet": (
        lambda folder: pq.write_table(pa.table(nodes()).slice(0, 0), f"{folder}/nodes.parquet"),
        {}, "nodes.parquet: the node table is empty",
    ),
    "no id": (without("id"), {}, r"nodes.parquet: no column 'id' \(source.id; null: .*\); found label, split, x"),
    "no label": (without("label"), {}, r"no column 'label' \(source.label\); found id, split"),
    "no named split": (with_nodes(), {"split": "mask"}, r"no column 'mask' \(source.split\)"),
    "no named feature": (with_nodes(), {"features": ("x", "q")}, r"no column 'q' \(source.features\)"),
    "a feature of text": (with_nodes(), {"features": ("note",)}, "row 0, column note: a number expected .*, found 'a'"),
    "no features": (without("x", "y"), {}, r"no columns of numbers for features \(source.features\); found id"),
    "lists of none": (with_nodes(v=pa.array([[]] * 4, pa.list_(pa.int8()))), {"features": ("v",)}, "have no features"),
    "no src": (with_edges(), {"src": "from"}, r"edges.parquet: no column 'from' \(source.src\); found src, dst"),
    "src of text": (with_edges(src=["a", "b", "c"]), {}, "'src' is string, but node ids are integers"),
    "dst of numbers": (
        with_nodes(id=["a", "b", "c", "d"]), {}, "'src' is int64, but node ids are text"
    ),
    "src of dates": (
        with_edges(src=pa.array([1] * 3, pa.date32())), {"id": None}, "'src' is date32.*, but node ids are row numbers"
    ),
    "half an end": (with_edges(src=[30, 10.5, 20]), {}, "edges.parquet: row 1, column src: no node has the id 10.5"),
    "half an id": (with_nodes(id=[1.0, 2.5, 3.0, 4.0]), {}, "row 1, column id: 2.5 is no whole number"),
    "ids of dates": (with_nodes(id=pa.array([1] * 4, pa.date32())), {}, "column 'id': integers, .*, found date32"),
    "another type": (two_files(x=["1", "2"]), TWO, "n/1.parquet: column 'x' is string, but double in .*n/0.parquet"),
    "another column": (two_files(q=[1, 2]), TWO, "n/0.parquet: no column 'q', which .*n/1.parquet has.*source.ignore"),
    "a column less": (two_files(y=None), TWO, "n/1.parquet: no column 'y', which .*n/0.parquet has"),
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
    "an end of 64 bits": (
        with_edges(src=pa.array([30, 10, 2**63], pa.uint64())), {}, "row 2, column src: no node has the id 9223372036"
    ),
    "a decimal id": (
        with_nodes(id=pa.array([Decimal("1.5")] * 4)), {}, "row 0 and below, column id: an id is no whole number"
    ),
    "an unknown id": (
        with_edges(dst=[10, 99, 98]), {},
        r"edges.parquet: row 1, column dst: no node has the id 99, and 2 of these 3 ids are of no node \(.*nodes.parq",
    ),
    "a missing end": (with_edges(src=[10, 20, None]), {}, "edges.parquet: row 2, column src: the id is missing"),
    "a row too far": (with_edges(src=[0, 4, 1], dst=[0, 1, 2]), {"id": None}, "row 1, column src: no node has .* 4"),
    "text among numbers": (
        text("edges.csv", "src,dst\n10,20\n10,x\n"), {"edges": "edges.csv"}, "row 1, column dst: no .* 'x', and 1 of"
    ),
    "a NaN": (with_nodes(x=[1.0, float("nan"), 1.0, 1.0]), {}, "row 1, column x: the feature is missing"),
    "an infinity": (two_files(x=[1.0, float("-inf")]), TWO, "n/1.parquet: row 1, column x: the feature .*infinite"),
    "beyond float32": (with_nodes(x=[1.0, 1.0, 1.0, 1e39]), {}, "row 3, column x: .*beyond float32"),
    "a missing number": (with_nodes(y=[1, 2, None, 4]), {}, "row 2, column y: the feature is missing"),
    "a missing list": (with_nodes(v=[[1.0, 2.0], None] * 2), {"features": ("v",)}, "row 1, column v.0.: the fea"),
    "a short list": (with_nodes(v=[[1.0, 2.0], [1.0]] * 2), {"features": ("v",)}, "row 1, column v: a list of 1 f"),
    "a NaN in a list": (with_nodes(v=[[1.0], [None]] * 2), {}, "row 1, column v.0.: the fea"),
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
    "another split": (with_nodes(split=["train", "hold"] * 2), {}, "row 1, .* train, val or .* found 'hold'"),
    "another code": (with_nodes(split=[0, 1, 2, 3]), {}, r"row 3, column split: 0 \(train\).*, found 3"),
    "a split of floats": (with_nodes(split=[0.5] * 4), {}, "row 0, column split: 0 .train.*, found 0.5"),
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
    "links of floats": (npy(FOUR, [0, 1, 0, 1], [[0, 0.5], [1, 1]]), NPY, "row 1, column src: no node has the id 0.5"),
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


@pytest.mark.parametrize(
    ("line", "reason"),
    [("5,0,one", "row 20, column x: 'one' is no number, but most"), ("5,zero,1", "")],
)
def test_what_comes_late_in_a_file_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK", 32)
    save(f"{tmp_path}/edges.csv", edges())
    rows = [f"{row + 10},{row % 2},1" for row in range(21)]
    results = []
    for at in (0, 20):
        table = [*rows[:at], *rows[at + 1 :]]
        table.insert(at, line)
        put(f"{tmp_path}/nodes.csv", "\n".join(["id,label,x", *table]).encode())
        config = TablesConfig(nodes=f"{tmp_path}/nodes.csv", edges=f"{tmp_path}/edges.csv", unknown_nodes="drop")
        if reason:
            with pytest.raises(InputError, match=reason.replace("row 20", f"row {at}")):
                open_tables(config, f"{tmp_path}/scratch")
        else:
            results.append(open_tables(config, f"{tmp_path}/scratch").about.class_names)
    assert results == ([] if reason else [["0", "1", "zero"]] * 2)
