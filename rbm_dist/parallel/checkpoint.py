"""Sharded checkpoints: saved by any number of ranks, loaded by any other number, on any storage.

A checkpoint is a folder of safetensors files, one per rank, written by `torch.distributed.checkpoint`, and a
`checkpoint.json` with their checksums, written last: without it there is no checkpoint. The two newest are kept, so
that a damaged one can be passed over.
"""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from rbm_dist import storage
from rbm_dist.errors import InputError, disk_full
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.parallel.mesh import Mesh

_INDEX = "checkpoint.json"
_KEEP = 2
_log = logging.getLogger(__name__)


def save(url: str, step: int, state: dict[str, Tensor], facts: dict[str, Any], mesh: Mesh) -> None:
    """Save `state` as checkpoint number `step` below `url`, with some JSON `facts`. Every rank must call it.

    Plain tensors must be equal on all ranks; sharded ones are `DTensor`s, see `training_state`.
    """
    folder = storage.join(url, f"step-{step:08d}")
    if mesh.rank == 0:
        storage.remove(folder)
    mesh.barrier()
    with tempfile.TemporaryDirectory() as scratch:
        writer = dcp.HuggingFaceStorageWriter(scratch, save_distributed=True)
        try:
            dcp.save(state, storage_writer=writer, no_dist=mesh.world_group is None)
        except (dcp.CheckpointException, OSError) as error:  # the former is no Exception
            raise _explain(error, folder) from None
        files = {path.name: storage.copy_in(path, storage.join(folder, path.name)) for path in Path(scratch).iterdir()}
    everyone: list[Any] = [files]
    if mesh.world_group is not None:
        everyone = [None] * mesh.world_size
        dist.all_gather_object(everyone, files, group=mesh.world_group)
    if mesh.rank == 0:
        merged = {name: info for files in everyone for name, info in files.items()}
        storage.write_json(storage.join(folder, _INDEX), {"step": step, "facts": facts, "files": merged})
        for old in _steps(url)[:-_KEEP]:
            storage.remove(storage.join(url, old))
    mesh.barrier()


def latest(url: str) -> tuple[str, dict[str, Any]] | None:
    """The newest whole checkpoint below `url` and its facts. A damaged or unfinished one is passed over."""
    for name in reversed(_steps(url)):
        folder = storage.join(url, name)
        if not storage.exists(storage.join(folder, _INDEX)):
            continue
        try:
            index = storage.read_json(storage.join(folder, _INDEX))
            storage.verify(folder, index["files"])
        except InputError as error:
            _log.warning("checkpoint passed over: %s", error)
            continue
        return folder, index["facts"]
    return None


def saved(url: str) -> set[str]:
    """All whole checkpoints anywhere below a URL."""
    fs, path = storage.filesystem(url)
    return {name for name in fs.find(path) if name.endswith(f"/{_INDEX}")}


def load(folder: str, state: dict[str, Tensor], mesh: Mesh | None = None) -> None:
    """Fill the tensors of `state` in place from a checkpoint, whatever number of ranks wrote it."""
    index = storage.read_json(storage.join(folder, _INDEX))
    with tempfile.TemporaryDirectory() as scratch:
        source = folder
        if not storage.is_local(folder):
            fs, path = storage.filesystem(folder)
            for name in index["files"]:
                fs.get_file(f"{path}/{name}", str(Path(scratch) / name))
            source = scratch
        reader = dcp.HuggingFaceStorageReader(storage.absolute(source))
        try:
            dcp.load(state, storage_reader=reader, no_dist=mesh is None or mesh.world_group is None)
        except (dcp.CheckpointException, OSError) as error:
            raise _explain(error, folder) from None


def sharded(model: nn.Module, tensors: dict[str, Tensor], num_experts: int, mesh: Mesh) -> dict[str, Tensor]:
    """Tensors named like the model's parameters, sharing their memory: experts' as `DTensor`s over their ranks."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, StackedExperts))
    if mesh.expert_group is None or not prefixes:
        return tensors

    def whole(local: Tensor) -> Tensor:
        shape = torch.Size([num_experts, *local.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        placement = [Replicate(), Shard(0)]
        return DTensor.from_local(local, mesh.device_mesh, placement, run_check=False, shape=shape, stride=stride)

    return {name: whole(tensor) if name.startswith(prefixes) else tensor for name, tensor in tensors.items()}


def training_state(model: nn.Module, optimizer: torch.optim.Adam, num_experts: int, mesh: Mesh) -> dict[str, Tensor]:
    """A model's and its optimiser's tensors by name, sharing their memory.

    The optimiser's state is created (zeros) where it has none yet, so that there is something to load into.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state = {f"model.{name}": tensor for name, tensor in sharded(model, tensors, num_experts, mesh).items()}
    for parameter in model.parameters():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    for slot in ("exp_avg", "exp_avg_sq"):
        moments = {name: optimizer.state[parameter][slot] for name, parameter in model.named_parameters()}
        state |= {f"{slot}.{name}": moment for name, moment in sharded(model, moments, num_experts, mesh).items()}
    state |= {f"step.{name}": optimizer.state[parameter]["step"] for name, parameter in model.named_parameters()}
    return state


def _steps(url: str) -> list[str]:
    return [name for name in storage.listdir(url) if re.fullmatch(r"step-\d+", name)]


def _explain(error: BaseException, folder: str) -> Exception:
    """The cause that `torch.distributed.checkpoint` wrapped, as one message."""
    causes = [error]
    if isinstance(error, dcp.CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError) and (full := disk_full(cause, folder)):
            return full
    return InputError(f"{folder}: the checkpoint could not be written or read: {causes[0]}")
