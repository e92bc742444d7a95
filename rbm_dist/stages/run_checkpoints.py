"""The checkpoints of a run, for people: which there are, whether they are whole, and one of them as a single file.

Reads storage alone, while the run is at work too: it needs neither its cluster nor its configuration.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.newest_checkpoint import damage, read_index


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint's folder; what its `checkpoint.json` says, and what is wrong with it as far as was looked."""

    folder: str
    loop: str
    index: dict[str, Any] | None
    wrong: list[str]

    @property
    def state(self) -> str:
        """`yes` if it is whole, else `unfinished` or `damaged`."""
        if not self.wrong:
            return "yes"
        return "unfinished" if self.wrong == [_unfinished(self.folder)] else "damaged"


def run_checkpoints(run: str, hashes: bool = False) -> list[RunCheckpoint]:
    """Every loop's checkpoints, oldest first. Looks at the files' sizes; with `hashes` reads them all.

    Raises `InputError` if there are none.
    """
    url = storage.absolute(run)
    folders = [storage.join(loop, name) for loop in _loops(url) for name in checkpoint.names(loop)]
    if not folders:
        raise InputError(f"{run}: no checkpoints: not a run's directory, or none of its loops has come so far")
    return [_look_at(url, folder, hashes) for folder in folders]


def consolidate(run: str, out: str, loop: str | None, step: int | None) -> RunCheckpoint:
    """Write one checkpoint as a safetensors file of whole tensors, and its facts as JSON beside it.

    The newest whole one, of all loops or of one, or that of a step. Raises `InputError`, also if a file is there.
    """
    facts_url = f"{out.removesuffix('.safetensors')}.json"
    for url in (out, facts_url):
        if storage.exists(url):
            raise InputError(f"{url}: is there already; name another file")
    every = run_checkpoints(run)
    wanted = [each for each in every if loop in (None, each.loop) and each.index]
    wanted = [each for each in wanted if step in (None, _of(each)["step"])]
    if not wanted:
        loops = ", ".join(dict.fromkeys(each.loop for each in every))
        raise InputError(f"{run}: no such checkpoint; `rbm-dist checkpoint ls` shows which there are, of {loops}")
    chosen = max(wanted, key=lambda each: (_of(each)["token"], _of(each)["when"]))
    with tempfile.TemporaryDirectory() as scratch:
        local = storage.absolute(chosen.folder) if storage.is_local(chosen.folder) else scratch
        wrong = damage(chosen.folder, _of(chosen)["files"], None if local != scratch else scratch)
        if wrong:
            raise InputError(f"{wrong[0]}; choose another with --step")
        metadata = dcp.HuggingFaceStorageReader(local).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(each.size, dtype=each.properties.dtype)
            for name, each in metadata.items()
            if isinstance(each, TensorStorageMetadata)  # all are
        }
        checkpoint.load(local, tensors, Mesh.single())
        save_file(tensors, f"{scratch}/whole")
        storage.copy_in(f"{scratch}/whole", out)
    storage.write_json(facts_url, {key: value for key, value in _of(chosen).items() if key != "files"})
    return chosen


def _loops(url: str) -> list[str]:
    """The folders in which loops keep their checkpoints."""
    students = [storage.join(url, "student", name) for name in storage.listdir(storage.join(url, "student"))]
    # What is no folder has no names in it, whatever storage makes of that.
    parents = [storage.join(url, "teacher"), *(each for each in students if not storage.is_file(each))]
    return [
        storage.join(parent, name)
        for parent in parents
        for name in storage.listdir(parent)
        if not storage.is_file(storage.join(parent, name))
    ]


def _look_at(url: str, folder: str, hashes: bool) -> RunCheckpoint:
    loop = folder.removeprefix(f"{url}/").rsplit("/", 1)[0].removesuffix("/checkpoints").removeprefix("student/")
    if not storage.exists(storage.join(folder, checkpoint.INDEX)):
        return RunCheckpoint(folder, loop, None, [_unfinished(folder)])
    try:
        index = read_index(folder)
    except InputError as error:
        return RunCheckpoint(folder, loop, None, [str(error)])
    wrong = damage(folder, index["files"]) if hashes else _wrong_sizes(folder, index["files"])
    return RunCheckpoint(folder, index["facts"].get("loop", loop), index, wrong)


def _unfinished(folder: str) -> str:
    return f"{folder}: unfinished, or being written"


def _wrong_sizes(folder: str, files: dict[str, storage.FileInfo]) -> list[str]:
    fs, path = storage.filesystem(folder)
    found = {each["name"].rsplit("/", 1)[-1]: each["size"] for each in fs.ls(path, detail=True)}
    differ = [name for name, info in files.items() if found.get(name) != info["bytes"]]
    return [f"{storage.join(folder, name)}: missing or cut off" for name in differ]


def _of(found: RunCheckpoint) -> dict[str, Any]:
    assert found.index is not None
    return found.index
