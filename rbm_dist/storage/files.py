"""Files that are written whole or not at all, with a checksum, and JSON in them.

They are written under a temporary name and renamed; object stores show a file when it is closed, and not before.
"""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rbm_dist.errors import InputError, disk_full
from rbm_dist.storage.checksums import CHUNK, FileInfo
from rbm_dist.storage.locations import TEMPORARY, exists, filesystem, is_local, remove, remove_each
from rbm_dist.storage.patient import for_people, gave_up, is_passing

# File systems that show a file only when it is closed. On all others it is written under another name first.
_COMMITTING = {"s3", "gs", "abfs"}
_BLOCK = 1 << 24  # bytes that are sent to them at a time, and held until then


class HashingWriter:
    """A binary stream that counts and hashes what passes through it."""

    def __init__(self, stream: Any, url: str):
        self._stream, self._url = stream, url
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        with explained(self._url):
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

    Raises `InputError` if the disk is full or the place cannot be written to, `RunError` if storage does not answer.
    """
    fs, path = filesystem(url)
    local = isinstance(fs, LocalFileSystem)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    commits = bool(protocols & _COMMITTING)
    temporary = path if commits else f"{path}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    stream: Any = None
    try:
        with explained(url):
            if local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            stream = fs.open(temporary, "wb", block_size=_BLOCK)
        yield HashingWriter(stream, url)
        with explained(url):
            stream.close()
            if local:
                os.replace(temporary, path)
            elif not commits:
                fs.mv(temporary, path)
    except BaseException as error:
        if stream is not None:
            _discard(fs, stream, temporary, commits)
        if isinstance(error, OSError):
            raise disk_full(error, url) or error from None
        raise


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what the user can cause (a folder that is not there or not theirs) into an `InputError`.

    What the network or a server causes becomes a `RunError`: by then the client library has tried often enough.
    """
    kinds = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
    numbers = (errno.EROFS, errno.ENAMETOOLONG)
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and (isinstance(error, kinds) or error.errno in numbers):
            raise InputError(f"{url}: cannot be written: {error.strerror or error}") from None
        if is_local(url):
            raise
        if is_passing(error):
            raise gave_up(url, "written", error, "each request was tried again") from None
        raise for_people(url, error) from None


def _discard(fs: fsspec.AbstractFileSystem, stream: Any, temporary: str, commits: bool) -> None:
    """Leave nothing of an unfinished file."""
    with suppress(Exception):  # such as a full disk, when the rest of a buffer is written; or storage that is gone
        if commits:
            stream.fs = fs.reads  # which does not try again: what it leaves, a bucket's rule of life cycle removes
            stream.discard()
        else:
            stream.close()
    if commits:
        stream.closed = True  # or it would begin another upload when it is collected
    elif fs.exists(temporary):
        fs.rm_file(temporary)


def write_json(url: str, value: Any) -> FileInfo:
    with atomic_writer(url) as stream:
        stream.write(json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")
    return stream.info


def read_bytes(url: str) -> bytes:
    """A whole file. Raises `InputError` if it is missing."""
    fs, path = filesystem(url)
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None


def read_json(url: str) -> Any:
    """Raises `InputError` if the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(url))
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
    remove_each(fs, [name for name in fs.find(path) if name.endswith(".json")])
    remove(url)


def link(source: str, url: str) -> None:
    """Let another URL have a file that never changes: by a hard link, by the store's own copy, or by copying it.

    Raises `InputError` if there is no such file.
    """
    fs, path = filesystem(source)
    to_fs, to_path = filesystem(url)
    if not fs.exists(path):
        raise InputError(f"{source}: no such file")
    if isinstance(fs, LocalFileSystem) and isinstance(to_fs, LocalFileSystem):
        _hard_link(path, to_path)
    elif type(fs) is type(to_fs) and not is_local(source):
        with explained(url):
            fs.cp_file(path, to_path)  # in a bucket it is there at once and whole
    else:
        with fs.open(path, "rb") as stream:
            _write_all(stream, url)


def _hard_link(path: str, to: str) -> None:
    temporary = f"{to}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    os.makedirs(os.path.dirname(to), exist_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # another disk, or one without links
        copy_in(path, to)
        return
    os.replace(temporary, to)
    if os.path.lexists(temporary):  # of two links to one file, a rename leaves both
        os.unlink(temporary)


def copy_in(local: str | Path, url: str) -> FileInfo:
    """Copy a local file to a URL, atomically."""
    with open(local, "rb") as source:
        return _write_all(source, url)


def _write_all(source: IO[bytes], url: str) -> FileInfo:
    with atomic_writer(url) as stream:
        while chunk := source.read(CHUNK):
            stream.write(chunk)
    return stream.info
