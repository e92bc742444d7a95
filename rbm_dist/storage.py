"""Files on any fsspec URL: written whole or not at all, with a checksum, and arrays that are memory-mapped.

Files are written under a temporary name and renamed; object stores commit on close. Arrays are plain `.npy`
(never pickled). An array on remote storage is read through a local cache, addressed by its checksum.
"""

import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from rbm_dist.errors import InputError, disk_full

TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(rf"(.+){re.escape(TEMPORARY)}[0-9a-f]{{8}}")
# File systems that show a file only when it is committed. On all others it is written under another name first.
_COMMITTING = {"s3", "gs", "abfs"}
_CHUNK = 1 << 22

FileInfo = dict[str, Any]
"""`{"bytes": int, "sha256": str}` of one file."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL and the path inside it. Raises `InputError` for an unknown or unusable scheme."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: cannot use this storage: {error}") from None
    fs.dircache.use_listings_cache = False  # other processes write here too
    return fs, path


def is_local(url: str) -> bool:
    return isinstance(filesystem(url)[0], LocalFileSystem)


def absolute(url: str) -> str:
    """The URL with a relative local path made absolute, so that it means the same in every process."""
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else url


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def is_file(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(fs.isfile(path))


def stamp(url: str, info: dict[str, Any] | None = None) -> tuple[str, int, str]:
    """A file's URL, bytes, and time of change or ETag: what tells it from one that was there before.

    `info`: fsspec's, where it is at hand. Raises `InputError` if there is no such file.
    """
    if info is None:
        fs, path = filesystem(url)
        try:
            info = fs.info(path)
        except FileNotFoundError:
            raise InputError(f"{url}: no such file") from None
        except OSError as error:
            raise InputError(f"{url}: cannot be read: {error.strerror or error}") from None
    names = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")
    return url, int(info["size"] or 0), str(next((info[name] for name in names if name in info), ""))


def listdir(url: str) -> list[str]:
    """Names in a directory, sorted; empty if it is not there."""
    fs, path = filesystem(url)
    if not fs.exists(path):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))


def remove(url: str) -> None:
    """Delete a file or a whole directory; nothing if it is not there. Of a link, the link."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)
    elif glob.has_magic(path):  # `rm` would take it for a pattern, and delete what it matches
        _remove_each(fs, fs.find(path))
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def remove_empty(url: str) -> None:
    """Delete a directory that holds nothing; object stores have none."""
    if is_local(url):
        with suppress(OSError):
            os.rmdir(absolute(url))


def _remove_each(fs: fsspec.AbstractFileSystem, paths: list[str]) -> None:
    with ThreadPoolExecutor(max_workers=16) as pool:
        for _ in pool.map(fs.rm_file, paths):
            pass


def remove_temporary(url: str, own: str = ".*") -> None:
    """Delete what killed writers left below a local directory. Object stores never show unfinished files.

    own: a regular expression of the names, in the directory itself, of files and folders that are looked at.
    """
    if not is_local(url):
        return
    top = absolute(url)
    for folder, below, names in os.walk(top):
        for name in names:
            made = _TEMPORARY_NAME.fullmatch(name)
            if made and (folder != top or re.fullmatch(own, made[1])):
                Path(folder, name).unlink(missing_ok=True)
        if folder == top:
            below[:] = [name for name in below if re.fullmatch(own, name)]


def is_temporary(name: str, of: str) -> bool:
    """Whether a file's name is one under which another is written."""
    made = _TEMPORARY_NAME.fullmatch(name)
    return made is not None and made[1] == of


class HashingWriter:
    """A binary stream that counts and hashes what passes through it."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self._stream.write(data)
        self._sha256.update(data)
        self._bytes += len(data)
        return len(data)

    @property
    def info(self) -> FileInfo:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}


@contextmanager
def atomic_writer(url: str) -> Iterator[HashingWriter]:
    """Write a file that appears complete when the block ends, and not at all if the block raises.

    Raises `InputError` if the disk is full or the place cannot be written to.
    """
    fs, path = filesystem(url)
    local = isinstance(fs, LocalFileSystem)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    commits = bool(protocols & _COMMITTING)
    temporary = path if commits else f"{path}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    stream: Any = None
    try:
        with _explained(url):
            if local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            stream = fs.open(temporary, "wb", autocommit=not commits)
        yield HashingWriter(stream)
        with _explained(url):
            stream.close()
            if commits:
                stream.commit()
            elif local:
                os.replace(temporary, path)
            else:
                fs.mv(temporary, path)
    except BaseException as error:
        if stream is not None:
            _discard(fs, stream, temporary, commits)
        if isinstance(error, OSError):
            raise disk_full(error, url) or error from None
        raise


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what the user can cause (a folder that is not there or not theirs) into an `InputError`."""
    try:
        yield
    except OSError as error:
        kinds = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
        if isinstance(error, kinds) or error.errno in (errno.EROFS, errno.ENAMETOOLONG):
            raise InputError(f"{url}: cannot be written: {error.strerror or error}") from None
        raise


def _discard(fs: fsspec.AbstractFileSystem, stream: Any, temporary: str, commits: bool) -> None:
    """Leave nothing of an unfinished file."""
    with suppress(OSError):  # such as a full disk, when the rest of a buffer is written
        if commits:
            stream.discard()
            stream.closed = True  # or it would begin another upload when it is collected
        else:
            stream.close()
    if not commits and fs.exists(temporary):
        fs.rm_file(temporary)


def write_json(url: str, value: Any) -> FileInfo:
    with atomic_writer(url) as stream:
        stream.write(json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")
    return stream.info


def read_json(url: str) -> Any:
    """Raises `InputError` if the file is missing or is not JSON."""
    fs, path = filesystem(url)
    try:
        return json.loads(fs.cat_file(path))
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{url}: not valid JSON ({error}); the file was changed or cut off") from None


def once(url: str, work: Callable[[], Any]) -> Any:
    """What `work` gives, kept as JSON at `url`: work that was finished before is not done again."""
    if exists(url):
        return read_json(url)
    result = work()
    write_json(url, result)
    return result


def remove_work(url: str) -> None:
    """Delete a folder of work that `once` kept. What it kept goes first: it must not outlive the files it speaks of."""
    fs, path = filesystem(url)
    _remove_each(fs, [name for name in fs.find(path) if name.endswith(".json")])
    remove(url)


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
    path = absolute(url) if is_local(url) else _cached(url, info)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    except Exception as error:  # numpy parses the header, and raises many kinds on a damaged one
        raise InputError(f"{url}: not a whole .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{url}: not a .npy array but an archive")
    return array


def file_info(url: str) -> FileInfo:
    """Size and checksum of a file, by reading it."""
    fs, path = filesystem(url)
    sha256, size = hashlib.sha256(), 0
    with fs.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha256.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def verify(base: str, files: dict[str, FileInfo]) -> None:
    """Compare every file with its recorded size and checksum. Raises `InputError` naming the first that differs."""

    def check(name: str) -> None:
        url, expected = join(base, name), files[name]
        try:
            found = file_info(url)
        except FileNotFoundError:
            raise InputError(f"{url}: missing, though it was written; restore it or delete its folder") from None
        if found["bytes"] != expected["bytes"]:
            raise InputError(
                f"{url}: truncated or changed: {found['bytes']:,} bytes, {expected['bytes']:,} were written. "
                "Restore it, or delete its folder to compute it again"
            )
        if found["sha256"] != expected["sha256"]:
            raise InputError(
                f"{url}: damaged: its checksum is not the one that was written. "
                "Restore it, or delete its folder to compute it again"
            )

    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in pool.map(check, sorted(files)):
            pass


def copy_in(local: str | Path, url: str) -> FileInfo:
    """Copy a local file to a URL, atomically."""
    with open(local, "rb") as source, atomic_writer(url) as stream:
        while chunk := source.read(_CHUNK):
            stream.write(chunk)
    return stream.info


@contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    """Hold a lock of the cache that all who write there share; the kernel takes it from whoever is killed."""
    with _explained(str(cache)):
        cache.mkdir(parents=True, exist_ok=True)
    _sweep(str(cache))
    handle = os.open(cache, os.O_RDONLY)
    try:
        with suppress(OSError):  # where folders cannot be locked, such as on NFS, nothing is swept
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


@functools.cache  # once per process, as it looks at every file
def _sweep(cache: str) -> None:
    """Delete what killed writers left in the cache, unless others are writing there."""
    handle = os.open(cache, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_temporary(cache)
    os.close(handle)


def _cached(url: str, info: FileInfo | None) -> str:
    fs, path = filesystem(url)
    folder = Path(tempfile.gettempdir()) / f"rbm-dist-cache-{os.getuid()}"
    name = info["sha256"] if info else hashlib.sha256(f"{url}{uuid.uuid4()}".encode()).hexdigest()
    target = folder / f"{name}.npy"
    if not target.exists():
        try:
            with _writing_to(folder), fs.open(path, "rb") as source, atomic_writer(str(target)) as stream:
                while chunk := source.read(_CHUNK):
                    stream.write(chunk)
                if info and stream.info != info:
                    raise InputError(f"{url}: damaged or truncated: its checksum is not the one that was written")
        except FileNotFoundError:
            raise InputError(f"{url}: no such file") from None
    return str(target)
