"""What a host has and can do: measured in this process, for `rbm-dist doctor`. Everything here is bounded in time."""

import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from rbm_dist import __version__, conditional_put, storage
from rbm_dist.cpus import usable_cpus
from rbm_dist.errors import InputError
from rbm_dist.graph.partition import available_memory
from rbm_dist.storage.cache import cache_folder

Facts = dict[str, Any]

_PAYLOAD = 16 << 20  # bytes written to storage and read again
_CHUNK = 1 << 20
_SEND_S, _CONNECT_S, _ANSWER_S = 1.0, 5.0, 10.0  # of a measurement between two hosts


def host_facts(session_dir: str | None = None) -> Facts:
    """Versions, processors, memory, disks and limits of this host; bytes. `session_dir`: where Ray spills to."""
    import ray
    import torch

    folders, cache_error = {"temporary folder": tempfile.gettempdir()}, None
    try:
        folders["cache of remote files"] = str(cache_folder())
    except InputError as error:
        cache_error = str(error)
    if session_dir:
        folders["Ray's spill folder"] = session_dir
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "rbm-dist": f"{__version__}, code {code_hash()}",
        "gpus": _gpus(),
        "torch_cuda": torch.version.cuda,
        "cpus": usable_cpus(),
        "memory": available_memory(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "free": {name: shutil.disk_usage(path).free for name, path in folders.items()},
        "cache_error": cache_error,
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.exists("/dev/shm") else 0,
    }


def code_hash() -> str:
    """A short hash of rbm-dist's own code as it lies here: hosts with other checkouts differ."""
    found = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def storage_facts(run_dir: str, marker: str | None = None) -> Facts:
    """Bytes per second written and read at a run directory, and whether it can be held by one driver.

    `marker`: a file that another host wrote there. What goes wrong is under `error`.
    """
    name = storage.join(run_dir, f"doctor-{uuid.uuid4().hex[:8]}")
    try:
        payload = os.urandom(_PAYLOAD)
        start = time.monotonic()
        with storage.atomic_writer(name) as stream:
            stream.write(payload)
        written = time.monotonic()
        fs, path = storage.filesystem(name)
        whole = fs.cat_file(path) == payload
        read = time.monotonic()
        storage.remove(name)
        return {
            "error": None if whole else "what was read is not what was written",
            "write": _PAYLOAD / (written - start), "read": _PAYLOAD / (read - written),
            "held": _can_be_held(name), "shared": marker is None or storage.exists(marker),
        }  # fmt: skip
    except Exception as error:  # of whatever library
        with suppress(Exception):
            storage.remove(name)
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _can_be_held(name: str) -> bool | None:
    """Whether conditional writes are kept to; None on a file system, which has locks."""
    if storage.is_local(name):
        return None
    if not conditional_put.is_possible(name):
        return False
    conditional_put.put(name, b"{}", None)
    try:
        return conditional_put.is_kept(name, b"{}")
    finally:
        storage.remove(name)


def _gpus() -> list[Facts]:
    """By the driver's own tool: Ray hides GPUs from processes that did not ask for one."""
    try:
        columns = "name,memory.total,driver_version"
        command = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in said.strip().splitlines()]
        return [{"name": name, "memory": int(mib) << 20, "driver": driver} for name, mib, driver in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


class Receiver:
    """Takes what other hosts send to this one, on a port of its own of one address, and tells them how much it was."""

    def __init__(self, ip: str):
        self._socket = socket.create_server((ip, 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="doctor", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=_receive, args=(connection,), daemon=True).start()


def _receive(connection: socket.socket) -> None:
    with connection, suppress(OSError):
        connection.settimeout(_SEND_S + _ANSWER_S)
        count = 0
        while data := connection.recv(_CHUNK):
            count += len(data)
        connection.sendall(count.to_bytes(8, "big"))


def send(ip: str, port: int, own_ip: str) -> float | str:
    """Bytes per second to another host's `Receiver`, or what went wrong."""
    try:
        with socket.create_connection((ip, port), timeout=_CONNECT_S, source_address=(own_ip, 0)) as connection:
            connection.settimeout(_ANSWER_S)
            chunk, start, sent = bytes(_CHUNK), time.monotonic(), 0
            while time.monotonic() - start < _SEND_S:
                connection.sendall(chunk)
                sent += len(chunk)
            connection.shutdown(socket.SHUT_WR)
            arrived = int.from_bytes(connection.recv(8), "big")
            seconds = time.monotonic() - start
    except OSError as error:
        return error.strerror or str(error)
    return sent / seconds if arrived == sent else f"of {sent:,} bytes {arrived:,} arrived"
