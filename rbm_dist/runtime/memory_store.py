"""The routing memory in one Ray actor: the central memory store of a training group.

Every rank pushes its sums for a version; when all are in, the actor writes the memory once and hands every rank the
next version. Sums are added in rank order, so the result does not depend on who came first. The actor belongs to rank
0: it ends with the group, and the next group starts a fresh one from the checkpoint.
"""

import asyncio
import uuid
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError
from torch import Tensor

from rbm_dist.errors import RunError
from rbm_dist.moe.collectives import traffic
from rbm_dist.moe.memory import InProcessMemoryStore, MemoryStore, RoutingMemory
from rbm_dist.moe.routing import MemoryStatistics
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.runtime.liveness import LifeSigns
from rbm_dist.runtime.placement import lasting_host
from rbm_dist.runtime.worker_logs import forward_warnings

_GRACE_S = 30.0  # the actor's own deadline comes first: its message names the missing ranks


def make_memory_store(
    kind: str, mesh: Mesh, timeout_s: float, decay: float, self_similarity: float, lr: float, reseed_after: int | None
) -> MemoryStore:
    """`actor` or `in_process`. Every rank must call it."""
    if kind == "in_process":
        return InProcessMemoryStore(mesh.world_group, decay, self_similarity, lr, reseed_after)
    return ActorMemoryStore(mesh, timeout_s, decay, self_similarity, lr, reseed_after)


class ActorMemoryStore:
    """A rank's end of the actor."""

    def __init__(
        self, mesh: Mesh, timeout_s: float, decay: float, self_similarity: float, lr: float,
        reseed_after: int | None = None,
    ):  # fmt: skip
        self._mesh, self._timeout_s = mesh, timeout_s
        name = [f"routing-memory-{uuid.uuid4().hex}"]
        if mesh.rank == 0:
            settings = {"decay": decay, "self_similarity": self_similarity, "lr": lr, "reseed_after": reseed_after}
            actor = ray.remote(num_cpus=0)(_MemoryActor).options(name=name[0], **lasting_host())
            self._actor = actor.remote(mesh.world_size, settings, timeout_s)
            ray.get(self._actor.ready.remote(), timeout=timeout_s)
        if mesh.world_group is not None:
            dist.broadcast_object_list(name, src=0, group=mesh.world_group)
        if mesh.rank != 0:
            self._actor = ray.get_actor(name[0])
        self._version = -1
        self._pending: Any = None
        self._current: list[Tensor] = []

    def init(self, memories: list[Tensor], state: dict[str, Tensor] | None) -> None:
        if self._mesh.rank == 0:
            packed = None if state is None else {key: _pack(tensor) for key, tensor in state.items()}
            self._get(self._actor.init.remote([_pack(memory) for memory in memories], packed))
        self._mesh.barrier()
        self._version = 0 if state is None else int(state["version"])
        self._pending = self._actor.current.remote()

    def pull(self, version: int) -> list[Tensor]:
        if self._pending is not None:
            self._current = [self._unpack(memory) for memory in self._get(self._pending)]
            self._pending = None
        if version != self._version:
            raise RuntimeError(f"routing memory: version {version} was asked for, {self._version} is here")
        return self._current

    def push(self, version: int, statistics: list[MemoryStatistics]) -> None:
        packed = [(_pack(layer.sum_ED), _pack(layer.mass_E)) for layer in statistics]
        traffic.sent += sum(array.nbytes for layer in packed for array in layer)
        # The answer is the next version; it arrives while the backward pass runs.
        self._pending = self._actor.push.remote(version, self._mesh.rank, packed)
        self._version = version + 1

    def snapshot(self, version: int) -> dict[str, Tensor]:
        self.pull(version)
        return {key: self._unpack(value) for key, value in self._get(self._actor.snapshot.remote()).items()}

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=self._timeout_s + _GRACE_S)
        except GetTimeoutError:
            raise RunError(f"routing memory: rank {self._mesh.rank} had no answer for {self._timeout_s:g} s") from None

    def _unpack(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self._mesh.device)


class _MemoryActor:
    def __init__(self, world_size: int, settings: dict[str, Any], timeout_s: float):
        torch.set_num_threads(1)
        LifeSigns("memory actor").start()
        self._warnings = forward_warnings("memory actor")
        self._world_size, self._settings, self._timeout_s = world_size, settings, timeout_s
        self._pushed: dict[int, list[MemoryStatistics]] = {}
        self._changed = asyncio.Condition()

    async def ready(self) -> None:
        """Answers once the actor is up."""

    async def init(self, memories: list[np.ndarray], state: dict[str, np.ndarray] | None) -> None:
        self._memory = RoutingMemory([torch.from_numpy(memory.copy()) for memory in memories], **self._settings)
        if state is not None:
            self._memory.restore({key: torch.from_numpy(np.array(value)) for key, value in state.items()})

    async def current(self) -> list[np.ndarray]:
        return [_pack(memory.detach()).copy() for memory in self._memory.memories]

    async def push(self, version: int, rank: int, packed: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Take a rank's sums; answers with the next version once every rank's are in."""
        if version != self._memory.version:
            raise RuntimeError(f"routing memory: rank {rank} pushed to version {version}, not {self._memory.version}")
        self._pushed[rank] = [
            MemoryStatistics(torch.from_numpy(total.copy()), torch.from_numpy(mass.copy())) for total, mass in packed
        ]
        async with self._changed:
            if len(self._pushed) == self._world_size:
                layers = zip(*(self._pushed[rank] for rank in sorted(self._pushed)), strict=True)
                self._memory.step([MemoryStatistics.total(list(layer)) for layer in layers])
                self._pushed.clear()
                await self._warnings.arrived()  # a stage whose last step this is ends with the answer
                self._changed.notify_all()
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._memory.version > version), self._timeout_s)
            except TimeoutError:
                missing = sorted(set(range(self._world_size)) - set(self._pushed))
                raise RunError(
                    f"routing memory: version {version}: nothing from rank(s) {missing} for {self._timeout_s:g} s"
                ) from None
        return await self.current()

    async def snapshot(self) -> dict[str, np.ndarray]:
        return {key: _pack(tensor) for key, tensor in self._memory.snapshot().items()}


def _pack(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
