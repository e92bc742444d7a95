"""The caller's node ids, integers or strings, and the row of each: a sorted index that is mapped from disk.

Of a string the index keeps a 64-bit hash. What is found is compared with the id itself, so no collision goes unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import pyarrow as pa
from numba import njit

from rbm_dist.errors import InputError
from rbm_dist.graph.csc import id_dtype
from rbm_dist.graph.random_bits import mix

MAX_BYTES = 1024
"""Length of a string id, in UTF-8."""


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


def index(id_N: np.ndarray, at: Callable[[int], str]) -> NodeIds:
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
            raise InputError(f"{at(b)}: the node id {shown(id_N[b])} is also that of {at(a)}; ids are given once")
    raise AssertionError


def is_whole(kind: pa.DataType) -> bool:
    """Whether ids of this type are integers."""
    return pa.types.is_integer(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether ids of this type are strings."""
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def from_arrow(column: pa.Array, name: str, at: Callable[[int], str]) -> np.ndarray:
    """A column of integers or strings as `[n]` int64 or fixed-width bytes.

    `at` says where a row is, for messages. Raises `InputError` for what is missing, too long or too large.
    """
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if column.null_count:
        raise InputError(f"{at(_first(column.is_null()))}, column {name}: the id is missing")
    if is_whole(column.type):
        try:
            return column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            raise InputError(f"{at(0)} and below, column {name}: an id is beyond 63 bits") from None
    column = column.cast(pa.large_binary())
    _, offsets, data = column.buffers()
    offset_n = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    length_n = np.diff(offset_n)
    content = np.frombuffer(data, np.uint8)[offset_n[0] : offset_n[-1]] if length_n.any() else np.empty(0, np.uint8)
    for wrong_n, trouble in (
        (length_n == 0, "the id is missing"),
        (length_n > MAX_BYTES, f"an id of {length_n.max(initial=0):,} bytes; at most {MAX_BYTES:,} are supported"),
    ):
        if wrong_n.any():
            raise InputError(f"{at(int(wrong_n.argmax()))}, column {name}: {trouble}")
    if not content.all():  # it would be lost at the end of fixed-width bytes
        row = int(np.searchsorted(offset_n - offset_n[0], np.flatnonzero(content == 0)[0], side="right")) - 1
        raise InputError(f"{at(row)}, column {name}: the id holds a zero byte")
    width = int(length_n.max(initial=1))
    byte_nW = np.zeros((len(column), width), np.uint8)
    byte_nW[np.arange(width) < length_n[:, None]] = content
    return byte_nW.view(f"S{width}")[:, 0]


def shown(node_id: np.generic) -> str:
    """An id as messages show it."""
    return repr(node_id.decode(errors="replace")) if isinstance(node_id, bytes) else str(node_id)


def _keys(id_n: np.ndarray, salt: int) -> np.ndarray:
    if id_n.dtype.kind != "S":
        return id_n
    words = -(-id_n.dtype.itemsize // 8)
    return _hashes(id_n.astype(f"S{8 * words}").view(np.uint64).reshape(len(id_n), words), np.uint64(salt))


@njit(cache=True)
def _hashes(word_nW, salt):  # type: ignore[no-untyped-def]
    """Of rows of 8 bytes each, as far as they are not zero: the width does not matter."""
    hash_n = np.empty(len(word_nW), np.uint64)
    for i in range(len(word_nW)):
        state = salt
        for word in word_nW[i]:
            if word == 0:
                break
            state = mix(state, word)
        hash_n[i] = state
    return hash_n


def _first(mask: pa.Array) -> int:
    return int(np.flatnonzero(mask.to_numpy(zero_copy_only=False))[0])
