"""Plain `.npy` arrays (never pickled): written in chunks, memory-mapped, or read in slices of their rows.

A remote array that is mapped comes through the local cache, whole; of one that is read in slices, these bytes alone.
"""

import io
import math
import struct
from collections.abc import Iterable
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from rbm_dist.errors import InputError, RunError
from rbm_dist.storage.cache import fetched
from rbm_dist.storage.checksums import FileInfo
from rbm_dist.storage.files import atomic_writer
from rbm_dist.storage.locations import absolute, filesystem, is_local

_HEADER = 256  # bytes in which the header of an array of numbers ends, as a rule
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def write_array(url: str, array: np.ndarray) -> FileInfo:
    """Write one `.npy` array atomically."""
    return write_chunks(url, array.dtype, array.shape, [array])


def write_chunks(url: str, dtype: Any, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> FileInfo:
    """Write one `.npy` array, given as chunks of its rows in order, in the memory of one chunk."""
    rows = 0
    with atomic_writer(url) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(stream, header)
        for chunk in chunks:
            rows += len(chunk)
            if chunk.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"{url}: rows of shape {chunk.shape[1:]} were written, {shape[1:]} were announced")
            stream.write(np.ascontiguousarray(chunk, dtype=dtype).reshape(-1).view(np.uint8))
        if rows != shape[0]:
            raise ValueError(f"{url}: {rows} rows were written, {shape[0]} were announced")
    return stream.info


def open_array(url: str, info: FileInfo | None = None) -> np.ndarray:
    """Memory-map a `.npy` array, read-only. A remote one is fetched once into the local cache (`info` addresses it).

    Raises `InputError` if the file is missing, truncated or not an array.
    """
    try:
        if not is_local(url):
            with fetched(url, info) as file:
                return _mapped(file)
        array = np.load(absolute(url), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    except (InputError, RunError):
        raise
    except Exception as error:  # numpy parses the header, and raises many kinds on a damaged one
        raise InputError(f"{url}: not a whole .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{url}: not a .npy array but an archive")
    return array


def _mapped(file: BinaryIO) -> np.ndarray:
    """The array of an open file. It keeps the file's lock, which a file that is opened anew would not have."""
    file.seek(0)
    header = _read_header(file)
    order: Any = "F" if header.fortran else "C"
    return np.memmap(file, header.dtype, "r", header.start, header.shape, order)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int  # of the values in the file


def _read_header(stream: BinaryIO | io.BytesIO) -> _Header:
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise ValueError("not a plain array")
    shape, fortran, dtype = _READERS[version](stream)
    if dtype.hasobject:
        raise ValueError(f"numbers or text expected, found dtype {dtype}")
    return _Header(shape, fortran, dtype, stream.tell())


class ArrayFile:
    """A `.npy` array whose rows are read in slices, by ranges of bytes, on any storage. Nothing is read before.

    Raises `InputError` if the file is missing, truncated or not an array.
    """

    def __init__(self, url: str, info: FileInfo | None = None):
        self.url = url
        self._info = info

    @cached_property
    def _header(self) -> _Header:
        content = self._bytes(0, _HEADER)
        try:
            if content[6:7] == b"\x01":  # the version; how long the header is follows
                length = 10 + struct.unpack("<H", content[8:10])[0]
            else:
                length = 12 + struct.unpack("<I", content[8:12])[0]
            if length > len(content):
                content = self._bytes(0, length)
            header = _read_header(io.BytesIO(content))
        except InputError:
            raise
        except Exception as error:  # of many kinds
            raise InputError(f"{self.url}: cannot be read: not a whole .npy array: {error}") from None
        size = header.start + math.prod(header.shape) * header.dtype.itemsize
        if self._info is not None and self._info["bytes"] != size:
            recorded = self._info["bytes"]
            raise InputError(f"{self.url}: was changed: {recorded:,} bytes were written, its header tells of {size:,}")
        return header

    @property
    def shape(self) -> tuple[int, ...]:
        return self._header.shape

    @property
    def dtype(self) -> np.dtype:
        return self._header.dtype

    @property
    def fortran(self) -> bool:
        """Whether the values of a column lie together, rather than those of a row."""
        return self._header.fortran and len(self.shape) > 1

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some rows, `[n, …]`, without a step."""
        if self.fortran:
            raise ValueError(f"{self.url}: its rows do not lie together")
        start, stop, _ = rows.indices(len(self))
        count, width = max(0, stop - start), math.prod(self.shape[1:])
        return self.values(start * width, count * width).reshape(count, *self.shape[1:])

    def values(self, start: int, count: int) -> np.ndarray:
        """Values as they lie in the file, from the `start`-th on, `[count]`."""
        size = self.dtype.itemsize
        begin = self._header.start + start * size
        content = self._bytes(begin, begin + count * size) if count else b""
        if len(content) < count * size:
            raise InputError(f"{self.url}: cut off: the file is shorter than its header says")
        return np.frombuffer(content, self.dtype)

    def _bytes(self, start: int, stop: int) -> bytes:
        fs, path = filesystem(self.url)
        try:
            return bytes(fs.cat_file(path, start=start, end=stop))
        except FileNotFoundError:
            raise InputError(f"{self.url}: no such file") from None
        except OSError as error:
            raise InputError(f"{self.url}: cannot be read: {error.strerror or error}") from None


Rows: TypeAlias = np.ndarray | ArrayFile
"""An array that is asked for slices of its rows."""


def open_rows(url: str, info: FileInfo | None = None) -> Rows:
    """An array of which slices of rows are wanted: mapped if it is local, else read by ranges of bytes."""
    return open_array(url, info) if is_local(url) else ArrayFile(url, info)
