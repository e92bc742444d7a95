"""The layout of a training group: data parallel × expert parallel. Every rank carries data.

Rank r belongs to expert group r // ep, whose ep ranks share one set of experts; ranks with equal r % ep hold the same
experts. Parts of the graph are dealt to all ranks, by the hosts that they are on.
"""

import datetime
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rbm_dist.models.norm import GlobalBatchNorm
from rbm_dist.models.student import Student
from rbm_dist.moe.collectives import Group
from rbm_dist.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from rbm_dist.parallel.deal import deal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place. Groups are None where there is one rank only."""

    rank: int
    world_size: int
    expert_parallel: int
    device: torch.device
    world_group: Group  # all ranks
    expert_group: Group  # the ranks that share one set of experts
    replica_group: Group  # the ranks that hold the same experts
    device_mesh: "DeviceMesh | None"
    hosts: tuple[str, ...] = ("",)  # of each rank
    cpu_group: Group = None  # all ranks, over CPU memory: for objects, and for the thread that writes checkpoints

    @classmethod
    def single(cls, device: torch.device | None = None) -> "Mesh":
        """One process, no process group."""
        return cls(0, 1, 1, device or torch.device("cpu"), None, None, None, None)

    @classmethod
    def init(
        cls, expert_parallel: int, device: torch.device, host: str = "", timeout_s: float = 300.0
    ) -> "Mesh":  # fmt: skip
        """Lay the default process group out. Every rank must call it. Raises `ValueError` if the sizes do not fit.

        host: a name of the machine that this rank is on; equal for all ranks there.
        timeout_s: longest wait for an object of another rank.
        """
        world = dist.get_world_size()
        _require_division(world, expert_parallel)  # before the ranks are joined, which one that leaves would break
        if world == 1:
            return cls.single(device)
        hosts = [""] * world
        dist.all_gather_object(hosts, host)
        group = dist.group.WORLD
        cpu_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        ranks = cls(dist.get_rank(), world, 1, device, group, None, group, None, tuple(hosts), cpu_group)
        return ranks.sharing(expert_parallel)

    def sharing(self, expert_parallel: int) -> "Mesh":
        """The same ranks, so many of which share a set of experts. Every rank must call it. Raises `ValueError`."""
        _require_division(self.world_size, expert_parallel)
        if expert_parallel == self.expert_parallel:
            return self
        replicas = self.world_size // expert_parallel
        mesh = init_device_mesh(self.device.type, (replicas, expert_parallel), mesh_dim_names=("replica", "expert"))
        return replace(
            self,
            expert_parallel=expert_parallel,
            expert_group=mesh.get_group("expert"),
            replica_group=mesh.get_group("replica") if replicas > 1 else None,
            device_mesh=mesh,
        )

    def parts(self, num_parts: int) -> list[int]:
        """The parts of the graph that this rank carries."""
        return deal(num_parts, self.hosts)[self.rank]

    def local_experts(self, num_experts: int) -> range:
        """The experts that live on this rank: equal consecutive shards, the last ranks may hold fewer or none."""
        per_rank = -(-num_experts // self.expert_parallel)
        first = min(self.rank % self.expert_parallel * per_rank, num_experts)
        return range(first, min(first + per_rank, num_experts))

    def dispatcher(self, num_experts: int, wire: torch.dtype | None = None) -> Dispatcher:
        """Local if all experts are here, else all-to-all. wire: type in which rows travel, see `AllToAllDispatcher`."""
        if self.expert_group is None:
            return LocalDispatcher(num_experts)
        return AllToAllDispatcher(num_experts, self.expert_group, wire)

    def join_batch_norms(self, student: Student) -> None:
        """Make every batch norm use the statistics of the global batch."""
        for module in student.modules():
            if isinstance(module, GlobalBatchNorm):
                module.group = self.world_group

    def barrier(self) -> None:
        if self.world_group is not None:
            dist.barrier(self.world_group)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, by rank: any object that can be pickled. Every rank must call it."""
        everyone: list[Any] = [value]
        if self.cpu_group is not None:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, value, group=self.cpu_group)
        return everyone

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gives, on every rank. Every rank must call it."""
        box = [value]
        if self.cpu_group is not None:
            dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]


def _require_division(ranks: int, expert_parallel: int) -> None:
    if ranks % expert_parallel:
        raise ValueError(f"{ranks} ranks cannot be laid out with {expert_parallel} ranks per set of experts")
