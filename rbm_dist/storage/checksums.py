"""Sizes and checksums of files, and whether files still have those with which they were written."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rbm_dist.errors import InputError
from rbm_dist.storage.locations import filesystem, join

CHUNK = 1 << 22

FileInfo = dict[str, Any]
"""`{"bytes": int, "sha256": str}` of one file."""


def file_info(url: str) -> FileInfo:
    """Size and checksum of a file, by reading it."""
    fs, path = filesystem(url)
    sha256, size = hashlib.sha256(), 0
    with fs.open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
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
