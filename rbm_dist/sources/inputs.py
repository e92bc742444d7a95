"""The files that a source is read from, and what tells that they are no longer those that were read."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePosixPath

from rbm_dist import storage
from rbm_dist.config.source import NpzConfig, OgbConfig, PygConfig, SourceSection, TablesConfig
from rbm_dist.config.update import UpdateConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import table_files
from rbm_dist.sources.ogb import ogb_files, ogb_folder

Stamps = Sequence[Sequence]
"""`storage.stamp`s: URL, bytes, time of change or ETag. As tuples, or as lists where they were kept as JSON."""


def input_files(config: SourceSection | UpdateConfig) -> dict[str, Stamps]:
    """The stamps of all files that a source, or an update, is read from, by the key that names them.

    None for one that is made.

    A dataset of OGB is fetched if it is not there. Raises `InputError` for what is not there.
    """
    match config:
        case NpzConfig(path=str(path)) | PygConfig(path=str(path)):
            if not storage.exists(path):
                raise InputError(f"{path}: no such file (source.path)")
            return {"source.path": [storage.stamp(path)]}
        case OgbConfig():
            return {"source.root": ogb_files(config)}
        case TablesConfig():
            urls = {"source.nodes": config.nodes, "source.edges": config.edges}
            return {key: table_files.find(url, key) for key, url in urls.items()}
        case UpdateConfig():
            tables = {f"update.{key}": table_files.find(url, f"update.{key}") for key, url in _tables(config).items()}
            return {"update.run": [storage.stamp(_graph(config))], **tables}
    return {}


def are_there(config: SourceSection | UpdateConfig) -> bool:
    """Whether anything is left of what a source is read from."""
    match config:
        case NpzConfig(path=str(path)) | PygConfig(path=str(path)):
            return storage.exists(path)
        case OgbConfig():
            return storage.exists(ogb_folder(config))
        case TablesConfig():
            return any(map(_matches, (config.nodes, config.edges)))
        case UpdateConfig():
            return any(map(_matches, (_graph(config), *_tables(config).values())))
    return True


def change(then: dict[str, Stamps], now: dict[str, Stamps]) -> str | None:
    """The first difference between two results of `input_files`, in words; None if names, sizes and times are the same.

    Folders may differ: a file is known by its path below the folder that it has in common with the others of its key.
    """
    for key in now | then:
        before, after = (_by_name(each.get(key, [])) for each in (then, now))
        for name in sorted(before.keys() | after.keys()):
            if name not in after:
                return f"{before[name][0]} is no longer there ({key})"
            url, size, time = after[name]
            if name not in before:
                return f"{url} was not there ({key})"
            _, old_size, old_time = before[name]
            if size != old_size:
                return f"{url} has {size:,} bytes, had {old_size:,} ({key})"
            if time != old_time:
                return f"{url} is of {_shown(time)}, was of {_shown(old_time)} ({key})"
    return None


def _graph(config: UpdateConfig) -> str:
    return storage.join(config.run, "graph", "graph.json")


def _tables(config: UpdateConfig) -> dict[str, str]:
    """The tables of an update that are given, by their keys."""
    tables = {key: getattr(config, key) for key in ("add_nodes", "add_edges", "drop_edges", "features")}
    return {key: url for key, url in tables.items() if url is not None}


def _matches(url: str) -> bool:
    fs, path = storage.filesystem(url)
    return bool(fs.exists(path) or fs.glob(path))


def _by_name(files: Stamps) -> dict[str, Sequence]:
    paths = [PurePosixPath(url) for url, _, _ in files]
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {str(path.relative_to(common)): file for path, file in zip(paths, files, strict=True)}


def _shown(time: str) -> str:
    try:
        return datetime.fromtimestamp(float(time)).isoformat(" ")
    except ValueError:  # an ETag
        return time
