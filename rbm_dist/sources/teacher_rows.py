"""Files of predictions that a model elsewhere made: whatever their format, an array `[rows, classes]` and maybe ids."""

import os
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rbm_dist import storage
from rbm_dist.config.teacher import ExternalTeacherConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.sources import table_files

_KEY = "teacher.external"
_PARQUET, _TORCH = (".parquet", ".pq"), (".pt", ".pth")


def read_rows(url: str, settings: ExternalTeacherConfig, num_classes: int) -> tuple[np.ndarray, pa.Array | None]:
    """A file's rows `[rows, classes]`, floats, and their ids if they are in the file.

    Arrays of `.npy`, `.pt` and raw files are mapped, those of `.npz` and Parquet read whole. Raises `InputError`.
    """
    suffix, ids = PurePosixPath(url).suffix.lower(), None
    try:
        if settings.dtype is not None:
            rows = _raw(url, settings.dtype, num_classes)
        elif suffix == ".npy":
            rows = storage.open_array(url)
        elif suffix == ".npz":
            rows = _npz(url, settings.array)
        elif suffix in _TORCH:
            rows = _torch(url, settings.array)
        elif suffix in _PARQUET:
            rows, ids = _parquet(url, settings.id_column if settings.rows == "ids" else None)
        else:
            raise InputError(
                f"{url}: predictions are read from .npy, .npz, .pt, .pth, .parquet and .pq files; of numbers without a "
                f"header set {_KEY}.dtype"
            )
    except (InputError, RunError):
        raise
    except FileNotFoundError:
        raise InputError(f"{url}: no such file ({_KEY}.paths)") from None
    except Exception as error:  # each library has its own
        raise InputError(f"{url}: cannot be read: {' '.join(str(error).split())[:300]} ({_KEY}.paths)") from None
    _check_shape(url, rows, num_classes)
    return rows, ids


def read_ids(url: str) -> pa.Array:
    """The ids of a `.npy` file, integers or text `[rows]`. Raises `InputError`."""
    found = storage.open_array(url)
    if found.ndim != 1 or found.dtype.kind not in "iuUS":
        raise InputError(f"{url}: ids are integers or text, one per row; this is {found.dtype} of shape {found.shape}")
    return pa.array(found.astype(str) if found.dtype.kind == "S" else np.asarray(found))


def _check_shape(url: str, rows: np.ndarray, num_classes: int) -> None:
    if rows.ndim != 2 or rows.dtype.kind != "f":
        hint = "; classes are not enough, a teacher says how likely each is" if rows.dtype.kind in "iub" else ""
        raise InputError(
            f"{url}: predictions are real numbers of shape [rows, classes]; this is {rows.dtype} of shape "
            f"{[*rows.shape]}{hint}"
        )
    if rows.shape[1] != num_classes:
        raise InputError(f"{url}: {rows.shape[1]} columns; the graph has {num_classes} classes")


def _opened(url: str) -> BinaryIO:
    """A file of this host's; a remote one is fetched into the cache, and safe there as long as it is open or mapped."""
    return open(storage.absolute(url), "rb") if storage.is_local(url) else storage.fetched(url)


def _raw(url: str, dtype: str, num_classes: int) -> np.ndarray:
    with _opened(url) as file:
        row, size = num_classes * np.dtype(dtype).itemsize, os.fstat(file.fileno()).st_size
        if not size or size % row:
            raise InputError(
                f"{url}: {size:,} bytes are no whole number of rows of {num_classes} {dtype} ({row:,} bytes each) "
                f"({_KEY}.dtype)"
            )
        return np.memmap(file, dtype, "r", shape=(size // row, num_classes))


def _npz(url: str, name: str | None) -> np.ndarray:
    with _opened(url) as file, np.load(file, allow_pickle=False) as archive:
        return archive[_chosen(url, archive.files, name)]


def _torch(url: str, name: str | None) -> np.ndarray:
    import torch

    with _opened(url) as file:  # of which torch maps what has a path
        path = f"/dev/fd/{file.fileno()}"
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(found, dict):
        tensors = [str(key) for key, value in found.items() if isinstance(value, torch.Tensor)]
        found = found[_chosen(url, tensors, name)]
    if not isinstance(found, torch.Tensor):
        raise InputError(f"{url}: holds a {type(found).__name__}, not a tensor or a dictionary of tensors")
    return (found.float() if found.dtype == torch.bfloat16 else found).detach().numpy()


def _chosen(url: str, names: list[str], name: str | None) -> str:
    if name in names:
        return name
    if name is None and len(names) == 1:
        return names[0]
    wanted = f"no array '{name}'" if name is not None else "several arrays; say which"
    raise InputError(f"{url}: {wanted if names else 'no arrays'} ({_KEY}.array); found {', '.join(names) or 'nothing'}")


def _parquet(url: str, id_column: str | None) -> tuple[np.ndarray, pa.Array | None]:
    """One column after the other: a reader of them all would hold several times what they are."""
    with _opened(url) as opened, pq.ParquetFile(opened) as file:
        schema, ids = file.schema_arrow, None
        names = [name for name in schema.names if name != id_column]
        if id_column is not None:
            if id_column not in schema.names:
                raise InputError(
                    f"{url}: no column '{id_column}' of ids ({_KEY}.id_column); found {', '.join(schema.names[:10])}"
                )
            ids = _column(file, id_column)
        if len(names) == 1 and table_files.is_list(schema.field(names[0]).type):
            values = _column(file, names[0]).flatten()
            return values.to_numpy(zero_copy_only=False).reshape(file.metadata.num_rows, -1), ids
        dtype = np.result_type(*(schema.field(name).type.to_pandas_dtype() for name in names))
        rows = np.empty((file.metadata.num_rows, len(names)), dtype)
        for number, name in enumerate(names):
            column = _column(file, name)
            if column.null_count:
                raise InputError(f"{url}: some predictions are missing")
            rows[:, number] = column.to_numpy(zero_copy_only=False)
        return rows, ids


def _column(file: pq.ParquetFile, name: str) -> pa.Array:
    return file.read(columns=[name]).column(0).combine_chunks()
