"""A remote file system that tries again: what is refused, slow or cut off is asked for once more, until a deadline.

Reads, listings and deletions give the same when they are done twice, so they are repeated here, after waits that grow
and are drawn by chance; the client library's own repetitions, which know no deadline, are switched off. What is written
goes as a stream: there the library repeats each request. Once the deadline has passed, all end in one `RunError`.
"""

import errno
import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from rbm_dist.errors import InputError, RunError

_TIMEOUT = "RBM_DIST_STORAGE_TIMEOUT_S"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 20.0
_PASSING = {errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH}
# Of client libraries that need not be installed; botocore's, aiohttp's, urllib3's.
_PASSING_NAMES = {
    "HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "ResponseParserError",
    "IncompleteRead", "IncompleteReadError", "HTTPException",
}  # fmt: skip
_CLIENTS = ("botocore.", "aiobotocore.", "aiohttp.", "gcsfs.", "google.", "azure.", "adlfs.")

Result = TypeVar("Result")


def timeout_s() -> float:
    """For how long an operation on remote storage is tried, in seconds. Raises `InputError` if that is no number."""
    value = os.environ.get(_TIMEOUT, "120")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"{_TIMEOUT}: seconds expected, found {value!r}")
    return seconds


def is_passing(error: BaseException) -> bool:
    """Whether an error may be gone a little later: one of the network, or of a server that is busy or has failed."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.errno in _PASSING or (error.errno is None and _is_named(error))
    return isinstance(error, ConnectionError | TimeoutError) or _is_named(error)


def _is_named(error: BaseException) -> bool:
    return bool(_PASSING_NAMES & {cls.__name__ for cls in type(error).__mro__})


def again(url: str, call: Callable[[], Result]) -> Result:
    """What `call` gives, which reads from `url` or deletes there; a passing error is waited out."""
    start, limit = time.monotonic(), timeout_s()
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise for_people(url, error) from None
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt)
            wait = random.uniform(longest / 2, longest)  # so that many workers do not come back at once
            if time.monotonic() - start + wait > limit:
                raise gave_up(url, "read", error, f"tried {attempt + 1} times") from None
        time.sleep(wait)
    raise AssertionError


def gave_up(url: str, done: str, error: BaseException, how: str) -> RunError:
    """The error that ends all trying. `done`: `read` or `written`."""
    text = " ".join(str(error).split()) or type(error).__name__
    return RunError(
        f"{url}: cannot be {done}: {text} ({how}, for {timeout_s():g} s: {_TIMEOUT}). See to it that the storage "
        "answers, and go on by the same command"
    )


def for_people(url: str, error: Exception) -> Exception:
    """What a client library says of credentials or settings, as an `InputError`; others as they are."""
    if isinstance(error, OSError) or not type(error).__module__.startswith(_CLIENTS):
        return error
    return InputError(f"{url}: cannot use this storage: {error}")


def patient(protocol: str, url: str) -> tuple["PatientFileSystem", str]:
    """The file system behind a remote URL and the path inside it."""
    fs, path = fsspec.core.url_to_fs(url, **_options(protocol, 1, timeout_s() / 8))
    if protocol == "s3":
        fs.retries = 1  # s3fs's own; it has no other way to set it
    # Waits between an S3 client's attempts are half of 1, 2, 4, 8, 16, 20, 20 … seconds, on average.
    attempts = 2 + next(n for n in itertools.count() if sum(min(2**k, 20) / 2 for k in range(n)) >= timeout_s())
    # A server says nothing while a block is sent to it.
    writes, _ = fsspec.core.url_to_fs(url, **_options(protocol, attempts, timeout_s() / 2))
    writes.retries = 1
    for each in (fs, writes):
        each.dircache.use_listings_cache = False  # other processes write here too
    return PatientFileSystem(fs, writes), path


def _options(protocol: str, attempts: int, silence_s: float) -> dict[str, Any]:
    """What fsspec is to open S3 with; others' libraries are left as they are."""
    if protocol != "s3":
        return {}
    known = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return {"config_kwargs": {"connect_timeout": silence_s, "read_timeout": silence_s, "retries": retries} | known}


def _repeated(name: str) -> Any:
    def method(self: "PatientFileSystem", path: Any, *args: Any, **kwargs: Any) -> Any:
        first = path[0] if isinstance(path, list) else path
        url = self.reads.unstrip_protocol(first)
        return again(url, lambda: getattr(self.reads, name)(path, *args, **kwargs))

    return method


class PatientFileSystem(AbstractFileSystem):
    """A remote file system of fsspec, each of whose operations is tried until it succeeds or the deadline has passed.

    Raises `RunError` then, `InputError` for what trying does not mend, and `OSError` for files that are not there.
    """

    cachable = False

    def __init__(self, reads: AbstractFileSystem, writes: AbstractFileSystem):
        super().__init__()
        self.reads, self.writes = reads, writes
        self.protocol = reads.protocol

    info = _repeated("info")
    ls = _repeated("ls")
    find = _repeated("find")
    glob = _repeated("glob")
    cat_file = _repeated("cat_file")
    get = _repeated("get")
    get_file = _repeated("get_file")
    pipe_file = _repeated("pipe_file")
    rm = _repeated("rm")
    rm_file = _repeated("rm_file")
    mv = _repeated("mv")
    cp_file = _repeated("cp_file")
    mkdir = _repeated("mkdir")
    makedirs = _repeated("makedirs")

    def exists(self, path: str, **kwargs: Any) -> bool:
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        return self._kind(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._kind(path) == "directory"

    def _kind(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "rb":
            return _Reader(self, path, mode, block_size=kwargs.pop("block_size") or "default", **kwargs)
        return self.writes.open(path, mode, **kwargs)

    def unstrip_protocol(self, name: str) -> str:
        return str(self.reads.unstrip_protocol(name))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.reads.invalidate_cache(path)


class _Reader(AbstractBufferedFile):
    """A remote file as a stream: each block of it is tried until it is there."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start=start, end=end)) if start < end else b""
