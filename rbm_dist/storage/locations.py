"""Where files are: URLs of any fsspec file system; what lies there, and how it is deleted."""

import glob
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rbm_dist.errors import InputError
from rbm_dist.storage.patient import patient

TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(rf"(.+){re.escape(TEMPORARY)}[0-9a-f]{{8}}")


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL and the path inside it. Raises `InputError` for an unknown or unusable scheme."""
    try:
        protocol = fsspec.core.split_protocol(url)[0] or "file"
        if protocol in ("file", "local", "memory"):
            fs, path = fsspec.core.url_to_fs(url)
            fs.dircache.use_listings_cache = False
            return fs, path
        return patient(protocol, url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: cannot use this storage: {error}") from None


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
        remove_each(fs, fs.find(path))
    elif fs.exists(path):
        with suppress(FileNotFoundError):  # of several attempts an earlier one did it
            fs.rm(path, recursive=True)


def remove_empty(url: str) -> None:
    """Delete a directory that holds nothing; object stores have none."""
    if is_local(url):
        with suppress(OSError):
            os.rmdir(absolute(url))


def remove_each(fs: fsspec.AbstractFileSystem, paths: list[str]) -> None:
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
