"""Columns of a node table to arrays: labels, split and features, each value checked and named where it is wrong."""

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources.node_ids import is_text

At = Callable[[int], str]
"""Says where a row is, for messages."""
_NOTHING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null")  # how text says that there is no value
_SPLITS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
_WHOLE = re.compile(r"-?\d{1,18}(\.0*)?")


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: of a dictionary, of what it stands for."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_feature(kind: pa.DataType) -> bool:
    """Whether a column of this type can be features: numbers, booleans, or lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


class Labels:
    """Labels, batch by batch. Text is a class name, unless all of it is whole numbers."""

    def __init__(self) -> None:
        self._names: dict[str, int] | None = None  # and codes, in the order in which they occur
        self._parts: list[np.ndarray] = []

    def add(self, column: pa.Array, name: str, at: At) -> None:
        """Raises `InputError` for numbers that are not whole."""
        if is_text(value_type(column.type)):
            if self._names is None:
                self._names = {}
            code_n, names = _encoded(column)
            codes = [self._names.setdefault(each, len(self._names)) for each in names]
            self._parts.append(np.array([*codes, -1])[code_n])
            return
        value_n = column.cast(pa.float64() if pa.types.is_floating(column.type) else pa.int64()).fill_null(-1)
        value_n = value_n.to_numpy(zero_copy_only=False)
        if value_n.dtype.kind == "f":
            value_n = np.where(np.isnan(value_n), -1, value_n)
            wrong_n = (value_n != np.trunc(value_n)) | (np.abs(value_n) > 1 << 53)
            if wrong_n.any():
                row = int(wrong_n.argmax())
                raise InputError(f"{at(row)}, column {name}: classes are whole numbers or names, found {value_n[row]}")
        self._parts.append(value_n.astype(np.int64))

    def finish(self) -> tuple[np.ndarray, list[str] | None]:
        """All labels, `[N]` int64 with -1 where there is none, and the class names, if the labels are names."""
        label_N = np.concatenate(self._parts)
        self._parts.clear()
        if self._names is None:
            return label_N, None
        names = sorted(name for name in self._names if name not in _NOTHING)
        if all(_WHOLE.fullmatch(name) for name in names):
            code = {name: int(name.split(".")[0]) for name in names}
            return _recode(label_N, code, self._names), None
        return _recode(label_N, {name: rank for rank, name in enumerate(names)}, self._names), names


def split(column: pa.Array, name: str, at: At) -> np.ndarray:
    """A column of train, val (valid, validation), test or nothing, or of the codes 0, 1, 2, -1, as `[n]` int8."""
    if is_text(value_type(column.type)):
        code_n, names = _encoded(column)
        for code, each in enumerate(names):
            if each.lower() not in _SPLITS and each not in _NOTHING:
                row = int((code_n == code).argmax())
                raise InputError(f"{at(row)}, column {name}: train, val or test expected, found '{each}'")
        return np.array([*(_SPLITS.get(each.lower(), NO_SPLIT) for each in names), NO_SPLIT], np.int8)[code_n]
    value_n = column.cast(pa.int64()).fill_null(NO_SPLIT).to_numpy(zero_copy_only=False)
    wrong_n = ~np.isin(value_n, (TRAIN, VAL, TEST, NO_SPLIT))
    if wrong_n.any():
        row = int(wrong_n.argmax())
        raise InputError(
            f"{at(row)}, column {name}: {TRAIN} (train), {VAL} (val), {TEST} (test) or {NO_SPLIT} expected, "
            f"found {value_n[row]}"
        )
    return value_n.astype(np.int8)


def width(column: pa.Array) -> int:
    """Features in a column: of lists, in the first of them."""
    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    return len(column[0].as_py() or ()) if not _is_scalar(column.type) else 1


def features(batch: pa.RecordBatch, widths: dict[str, int], at: At) -> np.ndarray:
    """Some columns side by side, `[n, F]` float32. Raises `InputError` for a value that is missing or not finite."""
    feat_nF = np.empty((batch.num_rows, sum(widths.values())), np.float32)
    start = 0
    with np.errstate(over="ignore"):
        for name, size in widths.items():
            feat_nF[:, start : start + size] = _values(batch.column(name), name, size, at)
            start += size
    if not np.isfinite(feat_nF).all():
        row, column = np.argwhere(~np.isfinite(feat_nF))[0]
        named = [f"{name}[{k}]" if size > 1 else name for name, size in widths.items() for k in range(size)]
        raise InputError(
            f"{at(int(row))}, column {named[column]}: the feature is missing, NaN, infinite or beyond float32"
        )
    return feat_nF


def _values(column: pa.Array, name: str, size: int, at: At) -> np.ndarray:
    """The values of a column, `[n, size]`; NaN where they are missing."""
    if not _is_scalar(column.type):
        length_n = column.value_lengths().fill_null(0) if column.null_count else column.value_lengths()
        wrong_n = length_n.to_numpy(zero_copy_only=False) != size
        if wrong_n.any():
            row = int(wrong_n.argmax())
            raise InputError(f"{at(row)}, column {name}: {length_n[row]} features, {size} in the first row of all")
        column = column.flatten()
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    return column.to_numpy(zero_copy_only=False).reshape(-1, size)


def _is_scalar(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind)


def _encoded(column: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Text as codes, -1 where there is none, and what they stand for."""
    if not isinstance(column, pa.DictionaryArray):
        column = column.cast(pa.large_string()).dictionary_encode()
    code_n = column.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return code_n, ["" if name is None else name for name in column.dictionary.to_pylist()]


def _recode(code_N: np.ndarray, wanted: dict[str, int], codes: dict[str, int]) -> np.ndarray:
    return np.array([*(wanted.get(name, -1) for name in codes), -1], np.int64)[code_N]
