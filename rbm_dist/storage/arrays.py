"""Plain `.npy` arrays (never pickled), written in chunks and memory-mapped; a remote one through the local cache."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from rbm_dist.errors import InputError
from rbm_dist.storage.cache import cached
from rbm_dist.storage.checksums import FileInfo
from rbm_dist.storage.files import atomic_writer
from rbm_dist.storage.locations import absolute, is_local


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
    path = absolute(url) if is_local(url) else cached(url, info)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    except Exception as error:  # numpy parses the header, and raises many kinds on a damaged one
        raise InputError(f"{url}: not a whole .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{url}: not a .npy array but an archive")
    return array
