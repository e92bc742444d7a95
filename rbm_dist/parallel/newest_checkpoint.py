"""Which checkpoint is loaded: the newest whole one, the same on all ranks.

Rank 0 decides which one is looked at, and all learn of it. Every host then reads each of its files once, through its
own mount or connection; the ranks of a host share them out, and hash what they read. If any rank finds damage, all
pass over that checkpoint together. What a host reads from object storage stays in a temporary folder of that host,
from which its ranks load: 64 ranks on 8 hosts read a checkpoint 8 times, no longer 128 times. One rank alone would read
it once, but with a 64th of the connections, and would not see what another host's mount makes of it.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.together import together

_CHUNK = 1 << 22
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A whole checkpoint: what it is called, what its `checkpoint.json` says, and a local folder to load it from."""

    name: str
    index: dict[str, Any]
    local: str

    @property
    def facts(self) -> dict[str, Any]:
        return self.index["facts"]


@contextmanager
def newest(url: str, mesh: Mesh) -> Iterator[Found | None]:
    """The newest whole checkpoint below `url`, which can be loaded in this block. Every rank must call it.

    One that is unfinished is passed over; so is a damaged one, with a warning of rank 0. Raises `InputError` or
    `RunError`, on all ranks, if storage cannot be read: nothing is passed over for that.
    """
    with tempfile.TemporaryDirectory() as own:
        # Equal where the temporary folder is the same one, whatever hosts and containers are called.
        place = os.stat(tempfile.gettempdir())
        everyone = mesh.gather(((socket.gethostname(), place.st_dev, place.st_ino), own))
        peers = [rank for rank, (host, _) in enumerate(everyone) if host == everyone[mesh.rank][0]]
        scratch = everyone[peers[0]][1]
        whole: list[str] = []
        with together(mesh, url):
            if mesh.rank == 0:
                whole = [each for each in checkpoint.names(url) if storage.exists(_index_of(url, each))]
        candidates = reversed(mesh.broadcast(whole))
        found = (_read(url, name, f"{scratch}/{name}", peers, mesh) for name in candidates)
        yield next((each for each in found if each), None)
        mesh.gather(None)  # the first rank's folder goes when the others have loaded from it


def damage(folder: str, files: dict[str, storage.FileInfo], copy_to: str | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, by their checksums. Reads each once; `copy_to` is a local folder."""

    def check(name: str) -> str | None:
        url, expected = storage.join(folder, name), files[name]
        try:
            found = storage.file_info(url) if copy_to is None else _copy(url, Path(copy_to) / name)
        except FileNotFoundError:
            return f"{url}: missing"
        if found["bytes"] != expected["bytes"]:
            return f"{url}: {found['bytes']:,} bytes, but {expected['bytes']:,} were written"
        return None if found["sha256"] == expected["sha256"] else f"{url}: its checksum is not the one that was written"

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [each for each in pool.map(check, sorted(files)) if each]


def read_index(folder: str) -> dict[str, Any]:
    """A checkpoint's `checkpoint.json`. Raises `InputError` if it is missing or damaged."""
    index = storage.read_json(storage.join(folder, checkpoint.INDEX))
    if not isinstance(index, dict) or not {"step", "token", "when", "ranks", "facts", "files"} <= index.keys():
        raise InputError(f"{storage.join(folder, checkpoint.INDEX)}: is not a checkpoint's")
    return index


def _read(url: str, name: str, scratch: str, peers: list[int], mesh: Mesh) -> Found | None:
    """Read this rank's share of a checkpoint's files; None, on all ranks, if any rank found damage."""
    folder, index, wrong = storage.join(url, name), None, []
    with together(mesh, folder):
        if mesh.rank == 0:
            try:
                index = read_index(folder)
            except InputError as error:
                wrong = [str(error)]
    index = mesh.broadcast(index)
    remote = not storage.is_local(folder)
    with together(mesh, folder):
        if index is not None:
            mine = sorted(index["files"])[peers.index(mesh.rank) :: len(peers)]
            wrong = damage(folder, {each: index["files"][each] for each in mine}, scratch if remote else None)
    wrong = [each for damaged in mesh.gather(wrong) for each in damaged]
    if wrong:
        if mesh.rank == 0:
            _log.warning("checkpoint passed over: %s; the one before it is taken", wrong[0])
        return None
    assert index is not None
    return Found(name, index, scratch if remote else storage.absolute(folder))


def _copy(url: str, path: Path) -> storage.FileInfo:
    fs, source = storage.filesystem(url)
    with fs.open(source, "rb") as stream, storage.atomic_writer(str(path)) as out:
        while chunk := stream.read(_CHUNK):
            out.write(chunk)
    return out.info


def _index_of(url: str, name: str) -> str:
    return storage.join(url, name, checkpoint.INDEX)
