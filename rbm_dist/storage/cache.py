"""Local copies of remote files, addressed by their checksums."""

import fcntl
import functools
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rbm_dist.errors import InputError
from rbm_dist.storage.checksums import CHUNK, FileInfo
from rbm_dist.storage.files import atomic_writer, explained
from rbm_dist.storage.locations import filesystem, remove_temporary


@contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    """Hold a lock of the cache that all who write there share; the kernel takes it from whoever is killed."""
    with explained(str(cache)):
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


def cached(url: str, info: FileInfo | None) -> str:
    fs, path = filesystem(url)
    folder = Path(tempfile.gettempdir()) / f"rbm-dist-cache-{os.getuid()}"
    name = info["sha256"] if info else hashlib.sha256(f"{url}{uuid.uuid4()}".encode()).hexdigest()
    target = folder / f"{name}.npy"
    if not target.exists():
        try:
            with _writing_to(folder), fs.open(path, "rb") as source, atomic_writer(str(target)) as stream:
                while chunk := source.read(CHUNK):
                    stream.write(chunk)
                if info and stream.info != info:
                    raise InputError(f"{url}: damaged or truncated: its checksum is not the one that was written")
        except FileNotFoundError:
            raise InputError(f"{url}: no such file") from None
    return str(target)
