"""Local copies of remote files: fetched once per host, shared by its processes, evicted when there are too many.

`<sha256>.npy` is whole. `<sha256>.part` is being fetched by the process that has locked it; the others wait for that
lock. Whoever opens a whole file shares a lock on it, which its mapping keeps until it is gone: eviction takes a file
only if it can lock it alone. One that is opened in that very moment is read all the same, as Linux keeps an unlinked
file until nobody has it open. Where files cannot be locked (some network file systems) each process fetches for itself,
and nothing is evicted.
"""

import fcntl
import functools
import hashlib
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rbm_dist.errors import InputError, RunError, disk_full
from rbm_dist.storage.checksums import FileInfo
from rbm_dist.storage.locations import filesystem, stamp
from rbm_dist.storage.patient import timeout_s

FOLDER, BUDGET = "RBM_DIST_CACHE", "RBM_DIST_CACHE_GB"
_BLOCK, _AT_ONCE = 1 << 24, 4  # bytes that are asked for at a time, and how many such
_WHOLE = 10**18  # the time of change, in ns, that is given to a whole file: one that was written to since has another
_log = logging.getLogger(__name__)


def fetched(url: str, info: FileInfo | None = None) -> BinaryIO:
    """The local copy of a remote file, opened, and safe from eviction as long as it is open or mapped.

    info: its recorded size and checksum; without it, it is known by URL, size and time of change (or ETag). Raises
    `InputError` if it is not there, damaged, or does not fit, `RunError` if the storage or another process hangs.
    """
    if info is None:
        found = stamp(url)
        name, size = hashlib.sha256(repr(found).encode()).hexdigest(), found[1]
    else:
        name, size = info["sha256"], info["bytes"]
    folder = cache_folder()
    while True:
        file = _whole(folder / f"{name}.npy", size) or _fetch(url, folder / f"{name}.npy", size, info)
        if file is not None:
            return file


def cache_folder() -> Path:
    """The folder of local copies, made if it is not there. Raises `InputError` if it cannot be this user's own."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(os.environ.get(FOLDER) or Path(base if os.path.isabs(base) else "~/.cache", "rbm-dist"))
    advice = f"set {FOLDER} to a folder of your own, on a disk with room"
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{folder}: no cache of remote files can be there: {error}; {advice}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        what = "is a link" if stat.S_ISLNK(found.st_mode) else "belongs to another user"
        raise InputError(f"{folder}: {what}, so that others could change what is read from it; {advice}")
    if found.st_mode & 0o022:
        raise InputError(f"{folder}: others may write to it; run chmod 700 {folder}, or {advice}")
    return folder


def budget() -> int:
    """Bytes that the cache may hold: what is configured, or half of what would be free without it."""
    folder, value = cache_folder(), os.environ.get(BUDGET)
    if value is None:
        held = sum(found.st_blocks * 512 for _, found in _files(folder))
        return (shutil.disk_usage(folder).free + held) // 2
    try:
        size = float(value) * 1e9
    except ValueError:
        size = 0.0
    if not size > 0:
        raise InputError(f"{BUDGET}: gigabytes expected, found {value!r}")
    return int(size)


def _whole(path: Path, size: int) -> BinaryIO | None:
    """A file that is there, opened; None, and it is removed, if it is not what was put there."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    _share(file, path.parent)
    found = os.fstat(file.fileno())
    if found.st_size == size and found.st_mtime_ns == _WHOLE:
        os.utime(file.fileno(), ns=(time.time_ns(), _WHOLE))  # used now; the system itself seldom notes that
        return file
    file.close()
    path.unlink(missing_ok=True)
    return None


def _fetch(url: str, path: Path, size: int, info: FileInfo | None) -> BinaryIO | None:
    """Fetch a file, opened; None after another process did, or gave up."""
    locks = _has_locks(path.parent)
    part = path.with_suffix(".part" if locks else f".{uuid.uuid4().hex[:8]}.part")
    file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    if locks:
        _wait_for_lock(file, url, part)
    done = False
    try:
        if _is_at(file, part) and not path.exists():  # else another process was faster, or gave up
            _make_room(url, file, size, locks)
            _download(url, file, info)
            os.fchmod(file.fileno(), 0o400)
            os.utime(file.fileno(), ns=(time.time_ns(), _WHOLE))
            os.rename(part, path)
            _share(file, path.parent)
            file.seek(0)
            done = True
    except OSError as error:
        raise disk_full(error, str(part)) or error from None
    finally:
        if not done:
            if _is_at(file, part):
                part.unlink()
            file.close()
    return file if done else None


def _download(url: str, file: BinaryIO, info: FileInfo | None) -> None:
    sha256, size = hashlib.sha256(), 0
    try:
        for block in _blocks(url, os.fstat(file.fileno()).st_size):
            file.write(block)
            file.flush()  # who waits looks at the time of change
            sha256.update(block)
            size += len(block)
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    if info and {"bytes": size, "sha256": sha256.hexdigest()} != info:
        raise InputError(f"{url}: damaged or truncated: its checksum is not the one that was written")


def _blocks(url: str, size: int) -> Iterator[bytes]:
    """A file's content in order, some blocks of it asked for at a time."""
    fs, path = filesystem(url)
    starts = iter(range(0, size, _BLOCK))
    with ThreadPoolExecutor(_AT_ONCE) as pool:

        def ask(start: int) -> Future[bytes]:
            return pool.submit(fs.cat_file, path, start=start, end=min(start + _BLOCK, size))

        asked = [ask(start) for start, _ in zip(starts, range(_AT_ONCE), strict=False)]
        while asked:
            yield asked.pop(0).result()
            asked += [ask(start) for start, _ in zip(starts, range(1), strict=False)]


def _make_room(url: str, file: BinaryIO, size: int, locks: bool) -> None:
    """Evict until so many bytes more are within the budget, and take them. Raises `InputError` if they never are."""
    folder = cache_folder()
    with _locked(folder):
        allowed = budget()
        files = sorted(_files(folder), key=lambda each: each[1].st_atime_ns)
        used = sum(found.st_size for _, found in files)
        for path, found in files if locks else ():
            # What a killed process left half-fetched goes in any case.
            if (used + size > allowed or path.suffix == ".part") and _evict(path):
                used -= found.st_size
        if used + size > allowed:
            raise InputError(
                f"{folder}: no room for {url}: its {size / 1e9:,.2f} GB are too many beside {used / 1e9:,.2f} in use, "
                f"of {allowed / 1e9:,.2f} that the cache may have. Raise {BUDGET}, set {FOLDER} to a larger disk, or "
                "let each host hold some parts only (cluster.shard_servers)"
            )
        file.truncate(size)


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # of another process, which is done with it
            found.append((path, path.stat()))
    return found


def _evict(path: Path) -> bool:
    """Delete a file that no process has open or mapped."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:
        return False
    return True


def _wait_for_lock(file: BinaryIO, url: str, part: Path) -> None:
    """Lock a file alone, or see it become another: whole, when those who map it share the lock, or none.

    Raises `RunError` if another process has it and writes nothing more to it.
    """
    limit = 2 * timeout_s()
    changed, since = -1, time.monotonic()
    while _is_at(file, part):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now = os.fstat(file.fileno()).st_mtime_ns
            if now != changed:
                changed, since = now, time.monotonic()
            elif time.monotonic() - since > limit:
                file.close()
                raise RunError(
                    f"{url}: another process of this host is fetching it to {part}, and has written nothing for "
                    f"{limit:g} s. End that process, or set {FOLDER} to another folder"
                ) from None
        time.sleep(0.02)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _share(file: BinaryIO, folder: Path) -> None:
    if _has_locks(folder):
        fcntl.flock(file, fcntl.LOCK_SH)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time decide what there is room for."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if _has_locks(folder):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@functools.cache
def _has_locks(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        return True
    except OSError as error:
        _log.warning(
            "%s: files cannot be locked there (%s), so every process fetches remote files for itself and none are "
            "evicted; set %s to a folder on a local disk", folder, error.strerror, FOLDER,
        )  # fmt: skip
        return False
    finally:
        os.close(handle)
