"""Rows of features from what users have: by name, whatever the order, and nothing that is misread silently."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from rbm_dist.errors import InputError
from rbm_dist.serve.features import FeatureReader
from rbm_dist.serve.format import Features
from tests.serve.exported import MIXED, NUMBERS

READER = FeatureReader(
    Features(columns=MIXED, named=True, missing=True, rows="", decimal=",", thousands=".", na_values=("?",))
)
PLAIN = FeatureReader(Features(columns=NUMBERS, named=True, missing=False, rows=""))
RECORDS = [
    {"id": "a", "age": 41, "emb": [1, 2, 3], "colour": "red", "member": True, "price": "1.234,5"},
    {"id": "b", "age": 0.5, "emb": [0, 0, -1.5], "colour": "pink", "member": False, "price": "?"},
    {"id": "c", "age": None, "emb": None, "colour": None, "member": None, "price": None},
]
EXPECTED = np.array(
    [
        [41, 1, 2, 3, 0, 0, 1, 1, 1234.5],
        [0.5, 0, 0, -1.5, 0, 0, 0, 0, np.nan],
        [np.nan] * 4 + [0, 0, 0] + [np.nan, np.nan],
    ],
    np.float32,
)


def table(**changes: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "price": ["1.234,5", "?", None], "member": ["true", "False", None], "colour": ["red", "pink", None],
        "emb": pa.array([[1, 2, 3], [0, 0, -1.5], None], pa.list_(pa.float32())), "age": [41, 0.5, None],
        "text": ["lorem", "ipsum", "dolor"],
    }  # fmt: skip
    return pa.table(columns | changes)


def test_records_and_tables_give_the_same() -> None:
    np.testing.assert_array_equal(READER.from_records(RECORDS), EXPECTED)
    np.testing.assert_array_equal(READER.from_table(table()), EXPECTED)
    typed = table(member=[True, False, None], price=[1234.5, None, None], emb=[[1, 2, 3], [0, 0, -1.5], None])
    np.testing.assert_array_equal(READER.from_table(typed), EXPECTED)
    frame = pd.DataFrame({name: [0.5, -1.5] for name in ("x3", "x0", "id", "x2", "x1")})
    frame["x2"] = np.array([7, 8], np.int8)
    np.testing.assert_array_equal(
        PLAIN.from_table(pa.Table.from_pandas(frame)), [[0.5, 0.5, 7, 0.5], [-1.5, -1.5, 8, -1.5]]
    )


def test_a_list_may_be_spread_over_columns() -> None:
    spread = table().drop_columns(["emb"])
    for k, values in enumerate(([1, 0, None], [2, 0, None], [3, -1.5, None])):
        spread = spread.append_column(f"emb[{k}]", pa.array(values, pa.float64()))
    np.testing.assert_array_equal(READER.from_table(spread), EXPECTED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": ["41", "2", "3"]}, "column 'age': numbers expected, found string"),
        ({"emb": [1.0, 2.0, 3.0]}, "column 'emb': lists of 3 numbers expected, found double"),
        ({"emb": [[1.0, 2.0]] * 3}, "row 0, column emb: a list of 2 features, but one of 3"),
        ({"colour": [1.5, 2.5, 3.5]}, "column 'colour': text expected, found double"),
        ({"price": ["1,5", "many", "2"]}, "row 1, column price: a number expected, found 'many'"),
        ({"age": [1.0, float("inf"), 2.0]}, "row 1, column age: the feature is infinite"),
        ({"age": [1.0, 1e39, 2.0]}, "row 1, column age: the feature is infinite or beyond float32"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        READER.from_table(table(**changes))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"x0": 1, "x2": 1}, r"row 1: no column 'x1' \(nor 1 more\); columns found: x0, x2"),
        ({"x0": 1, "x1": "2", "x2": 1, "x3": 1}, "row 1, column x1: a number expected, found '2'"),
        ({"x0": 1, "x1": [2], "x2": 1, "x3": 1}, r"row 1, column x1: a number expected, found \[2\]"),
        ([1, 2, 3, 4], "row 1: a mapping of columns to values expected"),
    ],
)
def test_records_that_cannot_be_read_are_refused(record: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PLAIN.from_records([{"x0": 1, "x1": 2, "x2": 3, "x3": 4}, record])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("emb", [1, 2], "a list of 2 features"),
        ("emb", "1,2,3", "column emb: a list of 3 numbers expected"),
        ("emb", [1, "2", 3], "column emb: a list of 3 numbers expected"),
        ("colour", ["red"], "column colour: text expected"),
        ("member", "maybe", "column member: true or false expected"),
        ("price", "12 or so", "column price: a number expected"),
    ],
)
def test_values_of_another_kind_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        READER.from_records([{**RECORDS[0], name: value}])


def test_what_is_beyond_float32_becomes_infinite_and_is_left_to_the_engine_to_refuse() -> None:
    [row] = PLAIN.from_records([{"x0": 10**400, "x1": 1e300, "x2": 0, "x3": True}])
    np.testing.assert_array_equal(row, [np.inf, np.inf, 0, 1])


@pytest.mark.parametrize("rows", [np.zeros((2, 3)), np.zeros((1, 2, 4)), np.array([["a"] * 4]), np.zeros(5), object()])
def test_arrays_of_another_shape_or_kind_are_refused(rows: Any) -> None:
    with pytest.raises(InputError, match="rows: "):
        PLAIN.from_array(rows)
