"""The caller's node ids, integers, text or bytes, and the row of each: a sorted index that is mapped from disk.

Of a string the index keeps a 64-bit hash. What is found is compared with the id itself, so no collision goes unseen.
"""

import re
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from rbm_dist.errors import InputError
from rbm_dist.graph.csc import id_dtype
from rbm_dist.graph.shards import IdType
from rbm_dist.randomness.bits import mix
from rbm_dist.sources import table_files
from rbm_dist.sources.pieces import At

MAX_BYTES = 1024
"""Length of a string id, in UTF-8."""
_END = b"\x01"  # behind ids of bytes, so that zeros at their end survive fixed widths


@dataclass(frozen=True)
class NodeIds:
    """Ids and their index. Per node: 8 bytes, or those of the longest string, for the id, and 12 for the index."""

    id: np.ndarray  # [N] int64 or 'S': fixed-width UTF-8
    key: np.ndarray  # [N], ascending: the ids themselves, or uint64 hashes of strings
    row: np.ndarray  # [N] int32 while rows fit: the row that each key is of
    salt: int  # of the hash

    def rows(self, id_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of each id, and which ids are not there (bool; their rows mean nothing)."""
        key_M = _keys(id_M, self.salt)
        order_M = np.argsort(key_M)  # neighbouring searches then share cache lines: five times as fast
        at_M = np.empty(len(id_M), np.int64)
        at_M[order_M] = np.searchsorted(self.key, key_M[order_M])
        row_M = self.row[at_M.clip(max=len(self.key) - 1)]
        return row_M, self.id[row_M] != id_M


def index(id_N: np.ndarray, of: IdType, at: At) -> NodeIds:
    """Index these ids. Memory per node, besides its id: 30 bytes and, of strings, a copy.

    `at` says where a row is, for messages. Raises `InputError` if an id occurs twice.
    """
    for salt in count():  # a second one where two strings have one hash: for 10^8 of them, once in 4,000 times
        key_N = _keys(id_N, salt)
        order_N = np.argsort(key_N)
        key_N = key_N[order_N]
        equal = np.flatnonzero(key_N[1:] == key_N[:-1])
        if not len(equal):
            return NodeIds(id_N, key_N, order_N.astype(id_dtype(len(id_N))), salt)
        first, second = np.sort(np.stack([order_N[equal], order_N[equal + 1]]), axis=0)
        twice = np.flatnonzero(id_N[first] == id_N[second])
        if len(twice):
            earliest = twice[second[twice].argmin()]
            a, b = int(first[earliest]), int(second[earliest])
            raise InputError(f"{at(b)}: the node id {shown(id_N[b], of)} is also that of {at(a)}; ids are given once")
    raise AssertionError


def id_type(kind: pa.DataType, wanted: str) -> IdType | None:
    """What a column of this type holds as ids, of which `wanted` (`auto`, `integer`, `text`) is asked; None: it cannot.

    Floating numbers and decimals are integers, if all of them are whole.
    """
    values = table_files.plain(kind)
    number = pa.types.is_integer(values) or pa.types.is_floating(values) or pa.types.is_decimal(values)
    text = table_files.is_string(values)
    if (number and wanted == "text") or (text and wanted != "integer"):
        return IdType("text", str(values))
    if number or (text and wanted == "integer"):
        return IdType("unsigned" if pa.types.is_uint64(values) else "integer", "int64" if text else str(values))
    if table_files.is_bytes(values) and wanted == "auto":
        return IdType("bytes", str(kind))
    return None


def arrow_type(name: str) -> pa.DataType:
    """The type that `str` of it names, as far as ids have it."""
    if name == "extension<arrow.uuid>":
        return pa.uuid()
    if found := re.fullmatch(r"fixed_size_binary\[(\d+)\]", name):
        return pa.binary(int(found[1]))
    if found := re.fullmatch(r"decimal(128|256)\((\d+), (-?\d+)\)", name):
        return (pa.decimal128 if found[1] == "128" else pa.decimal256)(int(found[2]), int(found[3]))
    return pa.type_for_alias(name)


def to_arrow(id_n: np.ndarray, of: IdType) -> pa.Array:
    """Ids as they came: a column of the type that they had."""
    kind = arrow_type(of.arrow)
    if of.kind == "unsigned":
        return pa.array(id_n.view(np.uint64))
    if of.kind == "text":
        return pa.array(id_n.astype(object), pa.binary()).cast(pa.string()).cast(kind)
    if of.kind == "bytes":
        storage = table_files.plain(kind)
        found = pa.array([each[: -len(_END)] for each in id_n.tolist()], storage)
        return pa.ExtensionArray.from_storage(kind, found) if isinstance(kind, pa.BaseExtensionType) else found
    return pa.array(id_n).cast(kind)


def from_arrow(column: pa.Array, of: IdType, name: str, at: At) -> tuple[np.ndarray, np.ndarray | None]:
    """A column of ids as `[n]` int64 or fixed-width bytes, and which values can be no id at all (bool; None: none).

    `at` says where a row is, for messages. Raises `InputError` for what is missing or too long.
    """
    column = table_files.cast(column, table_files.plain(column.type))
    if column.null_count:
        raise InputError(f"{at(_first(column.is_null()))}, column {name}: the id is missing")
    if not of.is_named:
        return _integers(column, of.kind == "unsigned", name, at)
    if of.kind == "text" and not table_files.is_string(column.type):
        column = _integer_text(column)
    return _bytes(column, name, at, _END if of.kind == "bytes" else b""), None


def _integers(column: pa.Array, unsigned: bool, name: str, at: At) -> tuple[np.ndarray, np.ndarray | None]:
    """Integers as int64, those of 64 bits without a sign as the bits that they have."""
    wrong: np.ndarray = np.zeros(len(column), bool)
    if table_files.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        if (empty := pc.equal(text, "")).true_count:
            raise InputError(f"{at(_first(empty))}, column {name}: the id is missing")
        is_number = pc.match_substring_regex(text, r"^-?[0-9]{1,19}(\.0*)?$")
        whole = pc.replace_substring_regex(pc.if_else(is_number, text, "0"), r"\.0*$", "")
        try:
            id_n = whole.cast(pa.int64()).to_numpy(zero_copy_only=False)
            wrong = ~is_number.to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:  # some have nineteen digits, and are too large
            values = [int(each) for each in whole.to_pylist()]
            fits_n = np.array([-(1 << 63) <= value < 1 << 63 for value in values])
            id_n = np.array([value if fits else 0 for value, fits in zip(values, fits_n, strict=True)], np.int64)
            wrong = ~fits_n | ~is_number.to_numpy(zero_copy_only=False)
    elif pa.types.is_floating(column.type):
        value_n = column.to_numpy(zero_copy_only=False)
        if (nan_n := np.isnan(value_n)).any():
            raise InputError(f"{at(int(nan_n.argmax()))}, column {name}: the id is missing")
        wrong = (value_n != np.trunc(value_n)) | (np.abs(value_n) > 1 << 53)
        id_n = np.where(wrong, 0, value_n).astype(np.int64)
    elif pa.types.is_uint64(column.type):
        id_n = column.to_numpy(zero_copy_only=False).view(np.int64)
        return id_n, None if unsigned or id_n.min(initial=0) >= 0 else id_n < 0
    else:
        try:
            id_n = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            raise InputError(f"{at(0)} and below, column {name}: an id is no whole number of 64 bits") from None
    if unsigned:
        wrong = wrong | (id_n < 0)
    return id_n, wrong if wrong.any() else None


def _integer_text(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):  # as text a float depends on who writes it, unless it is whole
        return column.cast(pa.int64()).cast(pa.string())
    return column.cast(pa.string())


def _bytes(column: pa.Array, name: str, at: At, end: bytes) -> np.ndarray:
    """Text or binary as fixed-width bytes, each with `end` behind it."""
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    column = column.cast(pa.large_binary())
    if end:
        ends = (pa.scalar(each, pa.large_binary()) for each in (end, b""))
        column = pc.binary_join_element_wise(column, *ends)
    _, offsets, data = column.buffers()
    offset_n = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    length_n = np.diff(offset_n)
    content = np.frombuffer(data, np.uint8)[offset_n[0] : offset_n[-1]] if length_n.any() else np.empty(0, np.uint8)
    for wrong_n, trouble in (
        (length_n == len(end), "the id is missing"),
        (length_n > MAX_BYTES, f"an id of {length_n.max(initial=0):,} bytes; at most {MAX_BYTES:,} are supported"),
    ):
        if wrong_n.any():
            raise InputError(f"{at(int(wrong_n.argmax()))}, column {name}: {trouble}")
    if not end and not content.all():  # it would be lost at the end of fixed-width bytes
        row = int(np.searchsorted(offset_n - offset_n[0], np.flatnonzero(content == 0)[0], side="right")) - 1
        raise InputError(f"{at(row)}, column {name}: the id holds a zero byte")
    width = int(length_n.max(initial=1))
    byte_nW = np.zeros((len(column), width), np.uint8)
    byte_nW[np.arange(width) < length_n[:, None]] = content
    return byte_nW.view(f"S{width}")[:, 0]


def shown(node_id: Any, of: IdType) -> str:
    """An id as messages show it."""
    if of.kind == "bytes":
        return bytes(node_id)[: -len(_END)].hex()
    if of.kind == "text":
        return repr(bytes(node_id).decode(errors="replace"))
    return str(node_id.view(np.uint64) if of.kind == "unsigned" else node_id)


def _keys(id_n: np.ndarray, salt: int) -> np.ndarray:
    if id_n.dtype.kind != "S":
        return id_n
    words = -(-id_n.dtype.itemsize // 8)
    return _hashes(id_n.astype(f"S{8 * words}").view(np.uint64).reshape(len(id_n), words), np.uint64(salt))


@njit(cache=True)
def _hashes(word_nW, salt):  # type: ignore[no-untyped-def]
    """Of rows of 8 bytes each, up to the last that are not zero: the width does not matter."""
    hash_n = np.empty(len(word_nW), np.uint64)
    for i in range(len(word_nW)):
        words = word_nW.shape[1]
        while words > 0 and word_nW[i, words - 1] == 0:
            words -= 1
        state = salt
        for word in word_nW[i, :words]:
            state = mix(state, word)
        hash_n[i] = state
    return hash_n


def _first(mask: pa.Array) -> int:
    return int(np.flatnonzero(mask.to_numpy(zero_copy_only=False))[0])
