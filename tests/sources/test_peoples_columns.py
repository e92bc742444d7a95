"""Columns as people have them: read as they were meant, or refused with what to change; nothing changed in silence."""

import decimal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources import csv_files, node_ids
from tests.sources.peoples_input import EDGES, NODES, left_out, opened, pairs, put_text
from tests.sources.pieces import read_edges, read_features
from tests.sources.table_input import save

# ------------------------------------------------------------------------------------------------------- splits
MASKS = {
    "booleans": ([True, False, False, False], [False, True, False, False], [False, False, True, False]),
    "numbers": ([1, 0, 0, 0], [0.0, 1.0, 0.0, 0.0], [0, None, 1, None]),
    "text": (["True", "False", "", "False"], ["FALSE", "TRUE", "false", "f"[:0]], ["0", "0", "1", "0"]),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_masks_are_the_split_and_no_features(tmp_path: Path, kind: str, suffix: str) -> None:
    masks = dict(zip(("train_mask", "val_mask", "test_mask"), MASKS[kind], strict=True))
    save(f"{tmp_path}/nodes.{suffix}", NODES | masks)
    source = opened(tmp_path, f"nodes.{suffix}")
    assert source.nodes().split.tolist() == [TRAIN, VAL, TEST, NO_SPLIT]
    assert source.num_features == 1
    assert source.about.notes["split"] == "train_mask, val_mask, test_mask"


def test_masks_may_be_called_valid(tmp_path: Path) -> None:
    masks = {"train_mask": [1, 0, 0, 0], "valid_mask": [0, 1, 0, 0], "test_mask": [0, 0, 1, 0]}
    save(f"{tmp_path}/nodes.parquet", NODES | masks)
    source = opened(tmp_path)
    assert source.nodes().split.tolist() == [TRAIN, VAL, TEST, NO_SPLIT]
    assert source.num_features == 1


def test_masks_that_contradict_or_are_not_whole_are_refused(tmp_path: Path) -> None:
    ones = [True] * 4
    save(f"{tmp_path}/nodes.parquet", NODES | {"train_mask": ones, "val_mask": ones, "test_mask": ones})
    with pytest.raises(InputError, match=r"nodes.parquet: row 0, column val_mask: the node is in two splits"):
        opened(tmp_path)
    save(f"{tmp_path}/nodes.parquet", NODES | {"train_mask": ones, "test_mask": ones})
    with pytest.raises(InputError, match="no column val_mask beside train_mask and test_mask"):
        opened(tmp_path)
    save(f"{tmp_path}/nodes.parquet", NODES | {"train_mask": [2] * 4, "val_mask": ones, "test_mask": ones})
    with pytest.raises(InputError, match="row 0, column train_mask: true or false"):
        opened(tmp_path)


def test_a_split_beside_masks_is_the_split(tmp_path: Path) -> None:
    masks = {f"{name}_mask": [False] * 4 for name in ("train", "val", "test")}
    save(f"{tmp_path}/nodes.parquet", NODES | masks | {"split": ["train", "val", "test", None]})
    source = opened(tmp_path)
    assert source.nodes().split.tolist() == [TRAIN, VAL, TEST, NO_SPLIT]
    assert source.num_features == 1
    assert set(left_out(source)) == set(masks)


@pytest.mark.parametrize(
    "split", [["0", "1", "2", "-1"], [0, 1, 2, None], [0.0, 1.0, 2.0, None], ["Train", "dev", "testing", "none"]]
)
def test_splits_are_words_or_codes(tmp_path: Path, split: list[Any]) -> None:
    for suffix in ("csv", "parquet"):
        save(f"{tmp_path}/nodes.{suffix}", NODES | {"split": split})
        assert opened(tmp_path, f"nodes.{suffix}").nodes().split.tolist() == [TRAIN, VAL, TEST, NO_SPLIT]


# ----------------------------------------------------------------------------------------------------- features
def features_of(folder: Path, column: list[Any], **config: Any) -> Any:
    put_text(folder / "nodes.csv", pd.DataFrame(NODES | {"f": column}).to_csv(index=False))
    return read_features(opened(folder, "nodes.csv", **config))[:, 1].tolist()


def test_text_is_numbers_if_all_of_it_is(tmp_path: Path) -> None:
    assert features_of(tmp_path, ["1", " 2.5 ", "+3", "-4e1"]) == [1, 2.5, 3, -40]
    assert features_of(tmp_path, ["True", "false", "TRUE", "False"]) == [1, 0, 1, 0]
    assert features_of(tmp_path, ["1,234.5", "2", "-1,000,000", "3.25"], thousands=",") == [1234.5, 2, -1e6, 3.25]
    assert features_of(tmp_path, ["1.234,5", "2,5", "3", "4"], thousands=".", decimal=",") == [1234.5, 2.5, 3, 4]
    found = features_of(tmp_path, ["1", "?", "NA", ""], na_values=("?",), missing="mean")
    np.testing.assert_array_equal(found, [1, np.nan, np.nan, np.nan])
    found = features_of(tmp_path, ["1", "-999", "3", "4"], na_values=(-999,), missing="mean")
    np.testing.assert_array_equal(found, [1, np.nan, 3, 4])


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (["1", "2", "?", "4"], r"row 2, column f: '\?' is no number, .*source.na_values: \['\?'\], or .*source.ignore"),
        (["1,234.5", "2", "3", "4"], "row 0, column f: '1,234.5' .*source.thousands=,"),
        (["1.234,5", "2", "3", "4"], "row 0, column f: .*source.decimal=, source.thousands=."),
        (["1,5", "2,5", "3,5", "4,5"], "row 0, column f: '1,5' .*source.decimal=,"),
        (["1", "2", "", "4"], "row 2, column f: the feature is missing or NaN; .*source.missing: mean or zero"),
        (["1", "inf", "3", "4"], "row 1, column f: the feature is infinite"),
    ],
)
def test_numbers_with_something_else_among_them_are_refused(tmp_path: Path, column: list[str], reason: str) -> None:
    with pytest.raises(InputError, match=rf"nodes.csv: {reason}"):
        features_of(tmp_path, column)


def test_what_is_left_out_is_named_with_the_reason(tmp_path: Path) -> None:
    table = NODES | {
        "Unnamed: 0": [0, 1, 2, 3], "title": ["a b", "c", "", "d"], "empty": [""] * 4, "extra": [1, 2, 3, 4],
    }  # fmt: skip
    put_text(tmp_path / "nodes.csv", pd.DataFrame(table).to_csv(index=False))
    save(f"{tmp_path}/edges.csv", EDGES | {"weight": [0.5, 2]})
    source = opened(tmp_path, "nodes.csv", "edges.csv", ignore=("extra",))
    found = left_out(source)
    assert set(found) == {"Unnamed: 0", "title", "empty", "extra", "weight"}
    assert "'a b'" in found["title"]
    assert "weights are not used" in found["weight"]
    assert [name for name, _ in source.about.features or []] == ["x"]
    table = pa.table(NODES | {"when": pa.array([1] * 4, pa.date32()), "note": ["1", "2", "3", "4"]})
    pq.write_table(table, tmp_path / "nodes.parquet")
    assert set(left_out(opened(tmp_path, edges="edges.csv"))) == {"when", "note", "weight"}
    assert opened(tmp_path, edges="edges.csv", features=("x", "note")).num_features == 2, "asked for, text is numbers"


def test_numbers_of_any_type_stand_side_by_side(tmp_path: Path) -> None:
    kinds = [pa.float16(), pa.uint8(), pa.int64(), pa.float32(), pa.float64(), pa.uint64()]
    columns = {f"f{kind}": pa.array(range(4), pa.int8()).cast(kind) for kind in kinds}
    save(f"{tmp_path}/nodes.parquet", NODES | columns)
    np.testing.assert_array_equal(read_features(opened(tmp_path))[:, 1:], np.arange(4)[:, None].repeat(6, axis=1))


def test_a_table_without_features_is_refused_with_what_became_of_its_columns(tmp_path: Path) -> None:
    put_text(tmp_path / "nodes.csv", "id,label,x\n7,0,12%\n8,1,50%\n")
    with pytest.raises(InputError, match=r"nodes.csv: nodes have no features.* x: text, such as '12%'"):
        opened(tmp_path, "nodes.csv")
    put_text(tmp_path / "nodes.txt", "id   label   x\n7   0   1\n")
    with pytest.raises(InputError, match=r"nodes.txt: column '' is there twice; where several spaces"):
        opened(tmp_path, "nodes.txt")


def test_decimals_are_numbers(tmp_path: Path) -> None:
    column = pa.array([decimal.Decimal(f"{value}.25") for value in range(4)], pa.decimal128(12, 4))
    save(f"{tmp_path}/nodes.parquet", NODES | {"f": column})
    np.testing.assert_array_equal(read_features(opened(tmp_path))[:, 1], [0.25, 1.25, 2.25, 3.25])


def test_categories_become_features_on_request(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.csv", NODES | {"color": ["red", "blue", "", "red"], "city": ["a", "b", "a", ""]})
    source = opened(tmp_path, "nodes.csv", one_hot=("color",), hashed=("city",), hash_width=5)
    assert [name for name, _ in source.about.features or []][:3] == ["x", "color=blue", "color=red"]
    found = read_features(source)
    np.testing.assert_array_equal(found[:, 1:3], [[0, 1], [1, 0], [0, 0], [0, 1]])
    np.testing.assert_array_equal(found[:, 3:].sum(axis=1), [1, 1, 1, 0])
    np.testing.assert_array_equal(found[0, 3:], found[2, 3:])


def test_lists_may_be_missing_anywhere(tmp_path: Path) -> None:
    lists = pa.array([[], [1.0, 2.0], None, [3.0, None]], pa.list_(pa.float32()))
    save(f"{tmp_path}/nodes.parquet", NODES | {"v": lists})
    found = read_features(opened(tmp_path, missing="zero"))[:, 1:]
    np.testing.assert_array_equal(found, [[np.nan, np.nan], [1, 2], [np.nan, np.nan], [3, np.nan]])


# ------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("column", "names", "label"),
    [
        (["cat", "dog", "-1", "cat"], ["cat", "dog"], [0, 1, -1, 0]),
        (["cat", "dog", "None", "<NA>"], ["cat", "dog"], [0, 1, -1, -1]),
        (["NA", "ZA", "", "BW"], ["BW", "NA", "ZA"], [1, 2, -1, 0]),
        (["0", "1", "NA", "1"], None, [0, 1, -1, 1]),
        (["00", "01", "00", "01"], ["00", "01"], [0, 1, 0, 1]),
        (["1.0", "0.0", "nan", "1.0"], None, [1, 0, -1, 1]),
    ],
)
def test_words_that_stand_for_no_label(
    tmp_path: Path, suffix: str, column: list[str], names: list[str] | None, label: list[int]
) -> None:
    save(f"{tmp_path}/nodes.{suffix}", NODES | {"label": column})
    source = opened(tmp_path, f"nodes.{suffix}")
    assert source.about.class_names == names
    assert source.nodes().label.tolist() == label


def test_a_number_may_stand_for_no_label(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.parquet", NODES | {"label": [0, 1, -100, 255]})
    with pytest.raises(InputError, match=r"row 2, column label: class -100 is out of range"):
        opened(tmp_path)
    assert opened(tmp_path, unlabelled=(-100, 255)).nodes().label.tolist() == [0, 1, -1, -1]


def test_classes_that_do_not_occur_have_names_too(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.parquet", NODES | {"label": ["a", "b", "a", "b"]})
    assert opened(tmp_path, num_classes=4).about.class_names == ["a", "b", "2", "3"]


def test_what_a_label_could_mean_is_said(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.csv", NODES | {"label": ["NA", "ZA", "None", "NA"]})
    source = opened(tmp_path, "nodes.csv")
    assert "read as no label: None (1)" in source.about.notes["label"]
    (warning,) = source.about.warnings
    assert "'NA' (2 nodes) is a class" in warning
    source = opened(tmp_path, "nodes.csv", unlabelled=("NA",))
    assert source.about.class_names == ["None", "ZA"]


# ---------------------------------------------------------------------------------------------------------- ids
@pytest.mark.parametrize(
    "ids",
    [
        pa.array([2**64 - 1, 0, 2**63, 5], pa.uint64()),
        pa.array([3, -1, 2**31 - 1, 0], pa.int32()),
        pa.array([3.0, 1.0, 2.0**53, 0.0]),
        pa.array([decimal.Decimal(each) for each in (10**18, 1, 2, 3)], pa.decimal128(38, 0)),
        pa.array([uuid.UUID(int=each).bytes for each in (0, 1, 2**64, 2**127)], pa.uuid()),
        pa.array([b"\0\0\0\0", b"a\0\0\0", b"a\0b\0", b"\0\0\0\1"], pa.binary(4)),
        pa.array([b"\0", b"\0\0", b"a", b"a\0" + b"x" * 20 + b"\0"]),
        pa.array(["00042", "42", "é", "042"], pa.large_string()),
        pa.array(["b", "a", "d", "c"]).dictionary_encode(),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_come_back_as_they_went_in(tmp_path: Path, ids: pa.Array) -> None:
    save(f"{tmp_path}/nodes.parquet", NODES | {"id": ids})
    save(f"{tmp_path}/edges.parquet", {"src": ids.take(pa.array([0, 3, 1])), "dst": ids.take(pa.array([2, 0, 3]))})
    source = opened(tmp_path)
    back = node_ids.to_arrow(source.nodes().orig_id, source.about.id_type)
    plain = ids.dictionary_decode() if isinstance(ids, pa.DictionaryArray) else ids
    assert back.type == plain.type
    assert back.to_pylist() == plain.to_pylist()
    assert read_edges(source).tolist() == [[0, 3, 1], [2, 0, 3]]


@pytest.mark.parametrize("place", [0, 1999])
def test_what_ids_are_does_not_depend_on_the_order_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK", 256)
    ids = [str(each) for each in range(1999)]
    ids.insert(place, "guest-1")
    save(f"{tmp_path}/nodes.csv", {"id": ids, "label": [0, 1] * 1000, "x": [1.5] * 2000})
    save(f"{tmp_path}/edges.csv", {"src": [5, 6], "dst": ["7", "guest-1"]})
    source = opened(tmp_path, "nodes.csv", "edges.csv")
    assert source.about.id_type.kind == "text"
    assert sorted(node_ids.to_arrow(source.nodes().orig_id, source.about.id_type).to_pylist()) == sorted(ids)
    assert pairs(source) == [("5", "7"), ("6", "guest-1")]


def test_ids_with_leading_zeros_are_text(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.csv", NODES | {"id": ["007", "08", "7", "10"]})
    put_text(tmp_path / "edges.csv", "src,dst\n007,08\n7,10\n")
    source = opened(tmp_path, "nodes.csv", "edges.csv")
    assert pairs(source) == [("007", "08"), ("7", "10")]
    with pytest.raises(InputError, match=r"row 2: the node id 7 is also that of .*row 0"):
        opened(tmp_path, "nodes.csv", "edges.csv", id_type="integer")


def test_ids_of_two_types_are_compared_as_one_on_request(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.parquet", NODES | {"id": ["7", "8", "9", "10"]})
    with pytest.raises(InputError, match=r"'src' is int64, but node ids are text .*source.id_type"):
        opened(tmp_path)
    assert pairs(opened(tmp_path, id_type="text")) == [("7", "8"), ("8", "10")]
    assert pairs(opened(tmp_path, id_type="integer")) == [(7, 8), (8, 10)]


def test_edges_that_pandas_made_floats_find_their_integers(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.csv", NODES)
    put_text(tmp_path / "edges.csv", "src,dst\n7,8\n8.0,10.0\n")
    assert pairs(opened(tmp_path, "nodes.csv", "edges.csv")) == [(7, 8), (8, 10)]


# ------------------------------------------------------------------------------------------------ unknown nodes
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_edges_to_unknown_nodes(tmp_path: Path, suffix: str) -> None:
    save(f"{tmp_path}/nodes.{suffix}", NODES)
    save(f"{tmp_path}/edges.{suffix}", {"src": [7, 99, 8, 98], "dst": [8, 7, 99, 99]})
    files = (f"nodes.{suffix}", f"edges.{suffix}")
    with pytest.raises(InputError, match=r"row 1, column src: no node has the id '?99'?.*source.unknown_nodes: drop"):
        read_edges(opened(tmp_path, *files))
    dropped = read_edges(opened(tmp_path, *files, unknown_nodes="drop"))
    assert dropped[:, (dropped >= 0).all(axis=0)].tolist() == [[0], [1]]
    source = opened(tmp_path, *files, unknown_nodes="add", missing="zero")
    assert source.num_nodes == 6
    assert source.nodes().orig_id.tolist() == [7, 8, 9, 10, 98, 99]
    assert source.nodes().label.tolist() == [0, 1, 0, 1, -1, -1]
    assert pairs(source) == [(7, 8), (99, 7), (8, 99), (98, 99)]
    assert np.isnan(read_features(source)[4:]).all()
    with pytest.raises(ValueError, match=r"source.unknown_nodes: added nodes have no features"):
        TablesConfig(nodes="n", edges="e", unknown_nodes="add")


def test_added_nodes_of_text_ids(tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.parquet", NODES | {"id": list("abcd")})
    save(f"{tmp_path}/edges.parquet", {"src": ["a", "a much longer name"], "dst": ["z", "b"]})
    source = opened(tmp_path, unknown_nodes="add", missing="mean")
    assert sorted(pairs(source)) == [("a", "z"), ("a much longer name", "b")]
