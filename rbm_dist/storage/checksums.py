"""Sizes, checksums and times of files, and whether files still are what was written.

A checksum takes reading the whole file. Who noted its time of change (on object storage its ETag) beside the checksum
need not read it again as long as time and size are the same.
"""

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rbm_dist.errors import InputError
from rbm_dist.storage.locations import filesystem, is_local, join, stamp

CHUNK = 1 << 22

FileInfo = dict[str, Any]
"""`{"bytes": int, "sha256": str}` of one file."""


def file_info(url: str, progress: Callable[[int], None] = lambda size: None) -> FileInfo:
    """Size and checksum of a file, by reading it. progress: is told of every chunk's bytes."""
    fs, path = filesystem(url)
    sha256, size = hashlib.sha256(), 0
    with fs.open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            sha256.update(chunk)
            size += len(chunk)
            progress(len(chunk))
    return {"bytes": size, "sha256": sha256.hexdigest()}


def sizes_and_times(base: str, names: Collection[str]) -> dict[str, tuple[int, str]]:
    """Bytes and time of change (or ETag) of those files below `base` that are there, by name."""
    fs, path = filesystem(base)
    if is_local(base):
        there = {name: fs.info(f"{path}/{name}") for name in names if fs.exists(f"{path}/{name}")}
    else:  # one listing of a folder says what a request for each of its files would
        folders = {name.split("/")[0] if "/" in name else "" for name in names}
        found = [item for folder in folders for item in fs.find(join(path, folder), detail=True).items()]
        below = {name[len(path) :].strip("/"): info for name, info in found}
        there = {name: below[name] for name in names if name in below}
    return {name: stamp(join(base, name), info)[1:] for name, info in there.items()}


def verify(
    base: str,
    files: dict[str, FileInfo],
    times: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, str]:
    """Compare files with their recorded sizes and checksums; gives their times of change (or ETags).

    times: those that were noted when the files were known to be right: who still has it is not read. progress: is told
    of every chunk's bytes that are read. Raises `InputError` naming the first that differs.
    """
    found = sizes_and_times(base, files)

    def check(name: str) -> None:
        url, expected = join(base, name), files[name]
        if name not in found:
            raise InputError(f"{url}: missing, though it was written; restore it or delete its folder")
        size, time = found[name]
        if size != expected["bytes"]:
            raise InputError(
                f"{url}: truncated or changed: {size:,} bytes, {expected['bytes']:,} were written. "
                "Restore it, or delete its folder to compute it again"
            )
        if (times or {}).get(name) != time and file_info(url, progress)["sha256"] != expected["sha256"]:
            raise InputError(
                f"{url}: damaged: its checksum is not the one that was written. "
                "Restore it, or delete its folder to compute it again"
            )

    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in pool.map(check, sorted(files)):
            pass
    return {name: time for name, (_, time) in found.items()}
