"""Columns of a node table to arrays: labels, split and features, each value checked and named where it is wrong."""

import re
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rbm_dist.errors import InputError
from rbm_dist.graph.splits import MASKS, NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources import table_files, text_columns
from rbm_dist.sources.pieces import At
from rbm_dist.sources.text_columns import NO_NUMBER, Words

_ADVICE = (
    "; say what it becomes (source.missing: mean or zero)",
    "; correct it, or leave the column out (source.ignore)",
)
_SPLITS = {
    "train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL, "test": TEST,
    "testing": TEST, "0": TRAIN, "1": VAL, "2": TEST, "-1": NO_SPLIT, "none": NO_SPLIT,
}  # fmt: skip
MASK_COLUMNS = {name: name for name in MASKS} | {"valid_mask": "val_mask", "validation_mask": "val_mask"}
"""The names of columns of masks, and the mask that each is."""
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d{0,17}))(\.0*)?")


@dataclass(frozen=True)
class Classes:
    """What a column of labels holds."""

    names: list[str] | None  # of the classes, in order, if they are names
    none: dict[str, int]  # words that were read as no label, and how often they occur
    doubtful: dict[str, int]  # classes whose name could mean that there is none, and their nodes


class Labels:
    """Labels, batch by batch. Text is a class name, unless all of it is whole numbers."""

    def __init__(self, unlabelled: tuple[str, ...]) -> None:
        self._unlabelled = frozenset(unlabelled)
        self._numbers = [int(word) for word in unlabelled if re.fullmatch(r"-?\d{1,18}", word)]
        self._names: dict[str, int] | None = None  # and codes, in the order in which they occur
        self._parts: list[np.ndarray] = []

    def add(self, column: pa.Array, name: str, at: At) -> None:
        """Raises `InputError` for numbers that are not whole."""
        if table_files.is_string(table_files.plain(column.type)):
            if self._names is None:
                self._names = {}
            code_n, names = _encoded(column)
            codes = [self._names.setdefault(each, len(self._names)) for each in names]
            self._parts.append(np.array([*codes, -1])[code_n])
            return
        if pa.types.is_decimal(column.type):
            column = column.cast(pa.float64())
        value_n = table_files.cast(column, pa.float64() if pa.types.is_floating(column.type) else pa.int64())
        value_n = value_n.fill_null(-1).to_numpy(zero_copy_only=False)
        if value_n.dtype.kind == "f":
            value_n = np.where(np.isnan(value_n), -1, value_n)
            wrong_n = (value_n != np.trunc(value_n)) | (np.abs(value_n) > 1 << 53)
            if wrong_n.any():
                row = int(wrong_n.argmax())
                raise InputError(f"{at(row)}, column {name}: classes are whole numbers or names, found {value_n[row]}")
        value_n = value_n.astype(np.int64)
        self._parts.append(np.where(np.isin(value_n, self._numbers), -1, value_n))

    def finish(self) -> tuple[np.ndarray, Classes]:
        """All labels, `[N]` int64 with -1 where there is none, and what the classes are."""
        label_N = np.concatenate(self._parts)
        self._parts.clear()
        if self._names is None:
            return label_N, Classes(None, {}, {})
        times = np.bincount(label_N[label_N >= 0], minlength=len(self._names))
        count = {name: int(times[code]) for name, code in self._names.items()}
        none = {name for name in count if name.strip() in self._unlabelled}
        doubtful = {name for name in count if name.strip() in NO_NUMBER and name not in none}
        numbers = {name: _WHOLE.fullmatch(name.strip()) for name in count if name not in none | doubtful}
        if numbers and all(numbers.values()):  # beside numbers, NA can only mean that there is none
            wanted = {name: int(found[1]) for name, found in numbers.items() if found}
            none |= doubtful
            names = None
        else:
            names = sorted(count.keys() - none)
            wanted = {name: rank for rank, name in enumerate(names)}
        recoded = np.array([*(wanted.get(name, -1) for name in self._names), -1], np.int64)[label_N]
        kept = {} if names is None else {name: count[name] for name in sorted(doubtful)}
        return recoded, Classes(names, {name: count[name] for name in sorted(none) if name.strip()}, kept)


def split(column: pa.Array, name: str, at: At) -> np.ndarray:
    """A column of train, val (valid, validation), test or nothing, or of the codes 0, 1, 2, -1, as `[n]` int8."""
    if table_files.is_string(table_files.plain(column.type)):
        code_n, names = _encoded(column)
        found = [NO_SPLIT if each.strip() in NO_NUMBER else _SPLITS.get(_code(each)) for each in names]
        for code, each in enumerate(names):
            if found[code] is None:
                row = int((code_n == code).argmax())
                raise InputError(
                    f"{at(row)}, column {name}: train, val or test expected, found '{each}'. Rename it, or name "
                    "another column (source.split; null: a split is drawn)"
                )
        return np.array([*found, NO_SPLIT], np.int8)[code_n]
    value_n = table_files.cast(column, pa.float64()).fill_null(NO_SPLIT).to_numpy(zero_copy_only=False)
    value_n = np.where(np.isnan(value_n), NO_SPLIT, value_n)
    wrong_n = ~np.isin(value_n, (TRAIN, VAL, TEST, NO_SPLIT))
    if wrong_n.any():
        row = int(wrong_n.argmax())
        raise InputError(
            f"{at(row)}, column {name}: {TRAIN} (train), {VAL} (val), {TEST} (test) or {NO_SPLIT} expected, "
            f"found {value_n[row]:g}"
        )
    return value_n.astype(np.int8)


def split_of_mask_columns(columns: dict[str, pa.Array], at: At) -> np.ndarray:
    """The split `[n]` int8 of columns named in `MASK_COLUMNS`: booleans, 0 and 1, or such text; missing: false.

    Raises `InputError` for another value and for a row that is in two.
    """
    split_n = None
    for name, column in columns.items():
        mask_n = _mask(column, name, at)
        split_n = np.full(len(mask_n), NO_SPLIT, np.int8) if split_n is None else split_n
        if (twice := mask_n & (split_n != NO_SPLIT)).any():
            raise InputError(f"{at(int(twice.argmax()))}, column {name}: the node is in two splits")
        split_n[mask_n] = MASKS[MASK_COLUMNS[name]]
    assert split_n is not None
    return split_n


def _mask(column: pa.Array, name: str, at: At) -> np.ndarray:
    kind = table_files.plain(column.type)
    if table_files.is_string(kind):
        found = text_columns.booleans(column, Words())
        column = found if found is not None else text_columns.numbers(column, Words())[0]
    value_n = table_files.cast(column, pa.float64()).fill_null(0).to_numpy(zero_copy_only=False)
    value_n = np.nan_to_num(value_n)
    wrong_n = (value_n != 0) & (value_n != 1)
    if wrong_n.any():
        raise InputError(f"{at(int(wrong_n.argmax()))}, column {name}: true or false (1 or 0) expected")
    return value_n == 1


@dataclass(frozen=True)
class Feature:
    """A column of the node table that gives features, and how."""

    name: str
    how: str  # number, text (numbers as text), bool (booleans as text), list, one_hot or hashed
    type: str  # what it is in the table, for people
    width: int
    values: tuple[str, ...] = ()  # of one_hot: what each of the features stands for

    @property
    def names(self) -> list[str]:
        """A name per feature."""
        if self.how == "one_hot":
            return [f"{self.name}={value}" for value in self.values]
        return (
            [self.name] if self.width == 1 and self.how != "list" else [f"{self.name}[{k}]" for k in range(self.width)]
        )


def widths(found: list[Feature]) -> int:
    return sum(each.width for each in found)


def features(
    batch: pa.RecordBatch, wanted: list[Feature], words: Words, at: At, missing: bool = False,
    advice: tuple[str, str] = _ADVICE,
) -> np.ndarray:  # fmt: skip
    """Some columns side by side, `[n, F]` float32, NaN where one is missing.

    Raises `InputError` for a value that is no number, infinite or beyond float32, and unless `missing` for a missing
    one. advice: what the message then says to do about one that is missing, and about one too large.
    """
    if all(each.how == "number" for each in wanted) and len(wanted) > 1:
        found_nF = _numbers_at_once(batch, [each.name for each in wanted])
    else:
        blocks = [_values(batch.column(each.name), each, words, at) for each in wanted]
        found_nF = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    with np.errstate(over="ignore"):
        feat_nF = found_nF.astype(np.float32, copy=False)
    wrong_nF = np.isinf(feat_nF) if missing else ~np.isfinite(feat_nF)
    if wrong_nF.any():
        row, column = np.argwhere(wrong_nF)[0]
        name = [name for each in wanted for name in each.names][column]
        value = found_nF[row, column]
        what = (
            f"the feature is missing or NaN{advice[0]}"
            if np.isnan(value)
            else f"the feature is infinite or beyond float32: {value:g}{advice[1]}"
        )
        raise InputError(f"{at(int(row))}, column {name}: {what}")
    return feat_nF


def _numbers_at_once(batch: pa.RecordBatch, names: list[str]) -> np.ndarray:
    """Columns of numbers as `[n, F]`: a table of thousands of columns is turned in one go."""
    columns = [batch.column(name) for name in names]
    kinds = {each.type for each in columns}
    if any(map(pa.types.is_boolean, kinds)) or any(map(pa.types.is_decimal, kinds)):
        columns = [table_files.cast(each, pa.float64()) for each in columns]
    elif any(map(pa.types.is_float16, kinds)):  # which Arrow does not turn into others there
        columns = [each.cast(pa.float32()) if pa.types.is_float16(each.type) else each for each in columns]
    return pa.RecordBatch.from_arrays(columns, names=names).to_tensor(null_to_nan=True, row_major=True).to_numpy()


def _values(column: pa.Array, feature: Feature, words: Words, at: At) -> np.ndarray:
    """The values of a column, `[n, width]` float64 or float32; NaN where they are missing."""
    name, size = feature.name, feature.width
    if feature.how == "list":
        return _lists(column, name, size, at)
    if feature.how in ("one_hot", "hashed"):
        return _categories(column, feature)
    if feature.how == "text":
        found, wrong_n = text_columns.numbers(table_files.cast(column, pa.large_string()), words)
        if wrong_n is not None:
            row = int(wrong_n.argmax())
            raise InputError(f"{at(row)}, column {name}: a number expected, found '{column[row].as_py()}'")
        column = found
    elif feature.how == "bool":
        found = text_columns.booleans(column, words)
        if found is None:
            raise InputError(f"{at(0)} and below, column {name}: true or false expected")
        column = found
    return table_files.cast(column, pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, 1)


def _lists(column: pa.Array, name: str, size: int, at: At) -> np.ndarray:
    """Lists of one length; none, or an empty one, is one of missing values."""
    length_n = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    wrong_n = (length_n != size) & (length_n != 0)
    if wrong_n.any():
        row = int(wrong_n.argmax())
        raise InputError(
            f"{at(row)}, column {name}: a list of {length_n[row]} features, but one of {size} in the first row that "
            "has any; all have one length"
        )
    values = column.flatten()
    if not pa.types.is_float32(values.type):
        values = table_files.cast(values, pa.float64())
    found_mS = values.to_numpy(zero_copy_only=False).reshape(-1, size)
    if len(found_mS) == len(column):
        return found_mS
    found_nS = np.full((len(column), size), np.nan)
    found_nS[length_n > 0] = found_mS
    return found_nS


def _categories(column: pa.Array, feature: Feature) -> np.ndarray:
    code_n, names = _encoded(table_files.cast(column, pa.large_string()))
    if feature.how == "one_hot":
        rank = {value: k for k, value in enumerate(feature.values)}
        place = [rank.get(name, -1) for name in names]
    else:
        place = [-1 if name == "" else bucket(name, feature.width) for name in names]
    place_n = np.array([*place, -1], np.int64)[code_n]
    found_nW = np.zeros((len(column), feature.width), np.float32)
    found_nW[np.flatnonzero(place_n >= 0), place_n[place_n >= 0]] = 1
    return found_nW


def bucket(value: str, width: int) -> int:
    """Which of `width` features a value is hashed to: the first bytes of its BLAKE2b."""
    return int.from_bytes(blake2b(value.encode(), digest_size=8).digest(), "little") % width


def width(column: pa.Array) -> int:
    """Features in a column of lists: those of the first that has any; 0 if none has."""
    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    return int(pc.max(column.value_lengths()[: _first_list(column) + 1]).as_py() or 0) if len(column) else 0


def _first_list(column: pa.Array) -> int:
    length_n = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return int((length_n > 0).argmax())


def _code(word: str) -> str:
    """A word of a split in the form that `_SPLITS` has: of 2.0, 2."""
    return re.sub(r"\.0*$", "", word.strip().lower())


def _encoded(column: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Text as codes, -1 where there is none, and what they stand for."""
    if not isinstance(column, pa.DictionaryArray):
        column = column.cast(pa.large_string()).dictionary_encode()
    code_n = column.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return code_n, ["" if name is None else name for name in column.dictionary.to_pylist()]
