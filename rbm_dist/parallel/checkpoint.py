"""Sharded checkpoints: saved by any number of ranks, loaded by any other number, on any storage.

A checkpoint is a folder of safetensors files, one per rank, written by `torch.distributed.checkpoint`, and a
`checkpoint.json` with their checksums, written last: without it there is no checkpoint. Its name has the step and the
token of the run's owner; checkpoints are ordered by token, then step, so that an owner who should have ended neither
displaces nor deletes those of its successor.
"""

import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from rbm_dist import storage
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.together import together

INDEX = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})\.(\d+)")


def name_of(step: int, token: int) -> str:
    """The folder of a checkpoint after so many steps."""
    return f"step-{step:08d}.{token}"


def names(url: str) -> list[str]:
    """The checkpoints below `url`, whole or not, oldest first."""
    return sorted(filter(_NAME.fullmatch, storage.listdir(url)), key=_order)


def save(
    url: str, step: int, state: dict[str, Tensor], facts: dict[str, Any], mesh: Mesh, token: int = 0, keep: int = 2,
    own: Any = None,
) -> None:  # fmt: skip
    """Save `state` as the checkpoint of `step` below `url`, with some JSON `facts`. Every rank must call it.

    Plain tensors must be equal on all ranks; sharded ones are `DTensor`s, see `training_state`. own: JSON of each rank,
    kept as the fact `own`, a list. The last `keep` checkpoints stay, and the one that `facts` name `best_checkpoint`.
    Raises, on all ranks, `InputError` or `RunError`; then nothing is left of this checkpoint, and the others stay.
    """
    name = name_of(step, token)
    folder = storage.join(url, name)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            with together(mesh, folder):
                if mesh.rank == 0:
                    storage.remove_work(folder)
            writer = dcp.HuggingFaceStorageWriter(scratch, save_distributed=True)
            with together(mesh, folder, at=scratch):
                dcp.save(state, storage_writer=writer, process_group=mesh.cpu_group, no_dist=mesh.cpu_group is None)
            files: dict[str, storage.FileInfo] = {}
            with together(mesh, folder):
                for path in Path(scratch).iterdir():
                    files[path.name] = storage.copy_in(path, storage.join(folder, path.name))
        written = mesh.gather((files, own))
        with together(mesh, folder):
            if mesh.rank == 0:
                _write_index(folder, step, token, facts, written)
                _retire(url, name, keep, facts.get("best_checkpoint"))
    except Exception:
        if mesh.rank == 0:
            storage.remove_work(folder)
        raise


def _write_index(folder: str, step: int, token: int, facts: dict[str, Any], written: list[tuple[Any, Any]]) -> None:
    index = {
        "step": step, "token": token, "when": round(time.time(), 3), "ranks": len(written),
        "facts": facts | {"own": [own for _, own in written]},
        "files": {name: info for files, _ in written for name, info in files.items()},
    }  # fmt: skip
    storage.write_json(storage.join(folder, INDEX), index)


def saved(url: str) -> set[str]:
    """All whole checkpoints anywhere below a URL."""
    fs, path = storage.filesystem(url)
    return {name for name in fs.find(path) if name.endswith(f"/{INDEX}")}


def _retire(url: str, newest: str, keep: int, best: str | None) -> None:
    """Delete what is no longer needed after `newest` was written.

    What comes after it, of this owner or of those before, is damaged or unfinished, and was passed over.
    """
    token, _ = _order(newest)
    own = [name for name in names(url) if _order(name)[0] <= token]
    whole = [name for name in own[: own.index(newest) + 1] if storage.exists(storage.join(url, name, INDEX))]
    for name in set(own) - {*whole[-keep:], best}:
        storage.remove_work(storage.join(url, name))


def load(folder: str, state: dict[str, Tensor], mesh: Mesh) -> None:
    """Fill the tensors of `state` in place from a local folder, whatever number of ranks wrote it.

    Raises `RunError` on all ranks if one of them cannot.
    """
    reader = dcp.HuggingFaceStorageReader(folder)
    with together(mesh, folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process is a single process
        dcp.load(state, storage_reader=reader, process_group=mesh.cpu_group, no_dist=mesh.cpu_group is None)


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


def _order(name: str) -> tuple[int, int]:
    """Token and step of a checkpoint, by which the newest is the largest."""
    made = _NAME.fullmatch(name)
    assert made is not None, name
    return int(made[2]), int(made[1])
