"""The lease of a run directory: one driver at a time works in it, and each owner has a higher number than the last.

On a file system it is a lock, which the kernel takes from whoever is killed. On object storage it is the file
`owner.json`, which its owner writes again and again; another may take it once it has been left alone for
`duration_s`. Hosts' clocks differ, so nobody compares their own with a time in the file: its age is that which the
storage tells, and time goes by the monotonic clock from there.
"""

import fcntl
import getpass
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from rbm_dist import conditional_put, storage
from rbm_dist.conditional_put import Found, RefusedError
from rbm_dist.errors import InputError, RunError

DURATION_S = 60.0
_RETRY_S = 2.0  # between tries to reach a storage that is away, and between looks at another's lease
_LOCK_TRIES, _LOCK_EVERY_S = 5, 0.1  # `rbm-dist status` holds the lock for a moment
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who works, or worked last, in a run directory. Times are Unix seconds by the owner's clock, for people."""

    token: int
    who: str  # user@host
    pid: int
    job: str | None  # the id of the Ray job
    since: float
    until: float | None  # None: until it ends
    duration_s: float
    released: bool

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        since = datetime.fromtimestamp(self.since, UTC)
        return f"{self.who} (pid {self.pid}{job}), since {since:%Y-%m-%d %H:%M:%S} UTC"

    def is_same(self, other: "Owner | None") -> bool:
        return other is not None and (self.token, self.who, self.pid) == (other.token, other.who, other.pid)

    def as_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


@contextmanager
def held(url: str, console: Console) -> Iterator[Owner]:
    """Hold a run directory while this block is at work; gives its owner, with a token that no one had before.

    Where the storage has no locks (Lustre is often mounted so), that is said, and the run goes on. Raises `InputError`
    if another driver holds it, and `RunError`, in the middle of a block in the main thread, if another took it.
    """
    if storage.is_local(url):
        with _locked(url):
            yield from _noted(url)
    elif not conditional_put.is_possible(url):
        _not_held(url, "this storage has no conditional writes")
        yield from _noted(url)
    else:
        yield from _renewed(url, console)


def look(url: str) -> tuple[Owner | None, bool | None]:
    """Who works, or worked last, in a run directory, and whether that driver is alive; None: this cannot be known."""
    if not storage.is_local(url) and conditional_put.is_possible(url):
        found = conditional_put.read(_path(url))
        owner = _parse(_path(url), found.data) if found else None
        if owner is None or found is None:
            return None, None
        return owner, not owner.released and found.age_s < owner.duration_s
    owner = _last(url)
    if owner is None or owner.released:
        return owner, None if owner is None else False
    if not storage.is_local(url):
        return owner, None
    try:
        handle = os.open(Path(url) / ".lock", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except BlockingIOError:
        return owner, True
    except OSError:
        return owner, None
    # Some file systems lock for each host on its own.
    return owner, False if owner.who == _who() else None


def _noted(url: str) -> Iterator[Owner]:
    """Keep `owner.json` where it is not the lease itself, for its token and for people."""
    last = _last(url)
    owner = _new(last, until=None)
    storage.write_json(_path(url), asdict(owner))
    try:
        yield owner
    finally:
        with suppress(OSError, InputError):
            if owner.is_same(_last(url)):
                storage.write_json(_path(url), asdict(replace(owner, released=True)))


@contextmanager
def _locked(url: str) -> Iterator[None]:
    try:
        Path(url).mkdir(parents=True, exist_ok=True)
        handle = os.open(Path(url) / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(f"{url}: cannot write to the run directory (run_dir): {error.strerror}") from None
    try:
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries_left:
                    raise _is_held(url, _last(url)) from None
                time.sleep(_LOCK_EVERY_S)
            except OSError as error:
                _not_held(url, str(error.strerror))
                break
        yield
    finally:
        os.close(handle)


def _renewed(url: str, console: Console) -> Iterator[Owner]:
    """Hold the lease on object storage, and stop the block if it is lost."""
    renewal = _Renewal(url)
    with _explained(url):
        owner = renewal.take(console)
        kept = conditional_put.is_kept(_path(url), owner.as_bytes())
    if not kept:
        _not_held(url, "this storage takes no notice of conditions")
        yield owner
        return
    interruptible = threading.current_thread() is threading.main_thread()
    before = signal.signal(renewal.interrupt, signal.default_int_handler) if interruptible else None
    try:
        try:
            renewal.start(interruptible)
            yield owner
        finally:
            renewal.stop()
    except BaseException:
        if renewal.lost is not None:
            raise RunError(renewal.lost) from None
        raise
    finally:
        if interruptible:
            signal.signal(renewal.interrupt, before or signal.SIG_DFL)
    if renewal.lost is not None:
        raise RunError(renewal.lost)


class _Renewal:
    """A lease on object storage, and the thread that keeps it."""

    # Handled as Ctrl-C is, which ends whatever the driver waits for; SIGINT itself is ignored in background jobs.
    interrupt = signal.SIGUSR2

    def __init__(self, url: str):
        self._url, self._path = url, _path(url)
        self._owner = _new(None, DURATION_S)
        self._version: str | None = None
        self._stop = threading.Event()
        self._interruptible = False
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self.lost: str | None = None  # in words

    def take(self, console: Console) -> Owner:
        """Take the lease when it is free. Raises `InputError` if another driver holds it."""
        found = conditional_put.read(self._path)
        last = _parse(self._path, found.data) if found else None
        if found and last and not last.released:
            found, last = self._wait(found, last, console)
        self._owner = _new(last, DURATION_S)
        try:
            self._version = conditional_put.put(self._path, self._owner.as_bytes(), found.version if found else None)
        except RefusedError:
            raise _is_held(self._url, _last(self._url)) from None
        return self._owner

    def _wait(self, found: Found, last: Owner, console: Console) -> tuple[Found | None, Owner | None]:
        """Wait until another's lease has been left alone for its whole duration: only then its owner is gone."""
        deadline = time.monotonic() + last.duration_s - max(0.0, found.age_s)
        left = deadline - time.monotonic()
        if left > 0:
            said = f"{self._url} was held by {last}; waiting for up to {left:.0f} s for a sign of life of that driver"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_RETRY_S, left))
            again = conditional_put.read(self._path)
            owner = _parse(self._path, again.data) if again else None
            if again is None or owner is None or owner.released:
                return again, owner
            if again.version != found.version:
                raise _is_held(self._url, owner)
        return found, last

    def start(self, interruptible: bool) -> None:
        self._interruptible = interruptible
        self._thread.start()

    def stop(self) -> None:
        """Give the lease back, if it is not lost."""
        self._stop.set()
        self._thread.join()  # one request at most, which has a deadline
        if self.lost is None:
            try:
                self._write(replace(self._owner, until=time.time(), released=True))
            except Exception as error:
                _log.warning("%s: not given back (%s): the next driver has to wait for it", self._path, error)

    def _run(self) -> None:
        away = False
        while self.lost is None and not self._stop.wait(_RETRY_S if away else DURATION_S / 3):
            try:
                self._write(replace(self._owner, until=time.time() + DURATION_S))
                away = False
            except Exception as error:  # as long as nobody else takes the lease, it is still ours
                if not away:
                    _log.warning("%s: cannot be renewed, will be tried again: %s", self._path, error)
                away = True

    def _write(self, owner: Owner) -> None:
        try:
            self._version = conditional_put.put(self._path, owner.as_bytes(), self._version)
            return
        except RefusedError:
            found = conditional_put.read(self._path)
        other = _parse(self._path, found.data) if found else None
        if other is None or self._owner.is_same(other):  # deleted with other files, or our own, whose answer was lost
            self._version = conditional_put.put(self._path, owner.as_bytes(), found.version if found else None)
            return
        self.lost = f"{self._url}: another rbm-dist took this run over, and this one stops: {other}"
        if self._interruptible and not self._stop.is_set():
            signal.pthread_kill(threading.main_thread().ident, self.interrupt)  # type: ignore[arg-type]


def _path(url: str) -> str:
    return storage.join(url, "owner.json")


def _new(last: Owner | None, until: float | None) -> Owner:
    now = time.time()
    metadata: dict[str, Any] = {}
    with suppress(ValueError):
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    return Owner(
        token=last.token + 1 if last else 1, who=_who(), pid=os.getpid(), job=metadata.get("job_submission_id"),
        since=now, until=None if until is None else now + until, duration_s=DURATION_S, released=False,
    )  # fmt: skip


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _last(url: str) -> Owner | None:
    fs, path = storage.filesystem(_path(url))
    try:
        return _parse(_path(url), fs.cat_file(path))
    except FileNotFoundError:
        return None


def _parse(path: str, data: bytes) -> Owner:
    """Raises `InputError` for a file that no lease wrote."""
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        raise InputError(f"{path}: is not a run's, and a run would write its own there. Set another run_dir") from None


def _is_held(url: str, owner: Owner | None) -> InputError:
    return InputError(f"{url}: another rbm-dist is at work in this run directory{f': {owner}' if owner else ''}")


def _not_held(url: str, why: str) -> None:
    _log.warning("%s: the run directory cannot be locked (%s); see to it that no other rbm-dist works in it", url, why)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except (PermissionError, FileNotFoundError, TimeoutError) as error:
        raise InputError(f"{url}: cannot write to the run directory (run_dir): {error}") from None
