"""The routing memory of all layers, its two writers, and the store that keeps it.

The memory is written by a moving average of the rows routed to each expert, and by an optimiser through the
self-similarity loss. Neither needs a model's gradients, so the store does both and is the memory's only owner:
workers `pull` a version, route with it, and `push` their sums; the next version exists once every rank has pushed.
"""

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist.moe.collectives import Group, all_reduce_sum
from rbm_dist.moe.routing import MemoryStatistics, moving_average, self_similarity_loss
from rbm_dist.randomness.rows import derive_keys, keyed_normal

_log = logging.getLogger(__name__)
# How far, as a length, a re-seeded memory lies from the busiest one: near enough to take some of its rows.
_RESEED_DISTANCE = 0.1


class RoutingMemory:
    """The memories `[E, D]` of all layers at one version, with their optimiser (Adam, no weight decay).

    An expert that no row chose for `reseed_after` steps gets a memory close to that of the expert with most rows.
    """

    def __init__(
        self, memories: list[Tensor], decay: float, self_similarity: float, lr: float, reseed_after: int | None = None
    ):
        self.memories = [memory.detach().clone().requires_grad_() for memory in memories]
        self.version = 0
        self._reseed_after = reseed_after
        # Steps without a row.
        self._idle = [torch.zeros(len(memory), dtype=torch.int64, device=memory.device) for memory in memories]
        self._decay, self._self_similarity = decay, self_similarity
        # foreach off: one code path on every device, and the layers are few.
        self._adam = torch.optim.Adam(self.memories, lr=lr, foreach=False)

    def step(self, statistics: list[MemoryStatistics]) -> None:
        """Write once: the moving average over the global batch, then the optimiser. Makes the next version."""
        for memory, layer in zip(self.memories, statistics, strict=True):
            memory.data = moving_average(memory.data, layer, self._decay)
        if self._self_similarity > 0:
            self._adam.zero_grad()
            torch.stack([self_similarity_loss(memory) for memory in self.memories]).sum().mul(
                self._self_similarity
            ).backward()
            self._adam.step()
        self.version += 1
        for index, sums in enumerate(statistics):
            self._idle[index] = torch.where(sums.mass_E > 0, 0, self._idle[index] + 1)
            if self._reseed_after is not None:
                for expert in (self._idle[index] >= self._reseed_after).nonzero().flatten().tolist():
                    self._reseed(index, expert, int(sums.mass_E.argmax()))

    @torch.no_grad()
    def _reseed(self, layer: int, expert: int, busiest: int) -> None:
        memory_ED = self.memories[layer]
        draw = derive_keys(derive_keys(self.version, torch.tensor([layer])), expert)
        direction = F.normalize(keyed_normal(draw, memory_ED.shape[1], memory_ED.dtype)[0], dim=0).to(memory_ED.device)
        memory_ED[expert] = F.normalize(F.normalize(memory_ED[busiest], dim=0) + _RESEED_DISTANCE * direction, dim=0)
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in self._adam.state[memory_ED]:
                self._adam.state[memory_ED][moment][expert] = 0
        self._idle[layer][expert] = 0
        _log.warning(
            "routing memory: layer %d: expert %d had no row for %d steps; its memory starts anew beside expert %d",
            layer, expert, self._reseed_after, busiest,
        )  # fmt: skip

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, as copies."""
        state = {"version": torch.tensor(self.version)}
        for layer, memory in enumerate(self.memories):
            state[f"{layer}.memory"] = memory.detach().clone()
            state[f"{layer}.idle"] = self._idle[layer].clone()
            adam = self._adam.state.get(memory, {})
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"{layer}.{name}"] = adam.get(name, torch.zeros_like(memory)).clone()
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a snapshot."""
        self.version = int(state["version"])
        for layer, memory in enumerate(self.memories):
            memory.data = state[f"{layer}.memory"].clone()
            self._idle[layer] = state[f"{layer}.idle"].to(memory.device, copy=True)
            self._adam.state[memory] = {
                "step": torch.tensor(float(self.version)),
                "exp_avg": state[f"{layer}.exp_avg"].clone(),
                "exp_avg_sq": state[f"{layer}.exp_avg_sq"].clone(),
            }


class MemoryStore(Protocol):
    """The routing memory as the workers of one training group see it. All ranks make the same calls."""

    def init(self, memories: list[Tensor], state: dict[str, Tensor] | None) -> None:
        """Set version 0 (every rank gives equal memories), or go on from a snapshot."""
        ...

    def pull(self, version: int) -> list[Tensor]:
        """The memories at that version; waits until every rank has pushed what it is made of."""
        ...

    def push(self, version: int, statistics: list[MemoryStatistics]) -> None:
        """Give this rank's sums over its rows, computed with that version."""
        ...

    def snapshot(self, version: int) -> dict[str, Tensor]:
        """The full state at that version, for a checkpoint."""
        ...


class InProcessMemoryStore:
    """A copy of the memory in every rank, kept equal by adding the pushed sums over the group."""

    def __init__(self, group: Group, decay: float, self_similarity: float, lr: float, reseed_after: int | None = None):
        self._group = group
        self._settings = (decay, self_similarity, lr, reseed_after)
        self._memory: RoutingMemory | None = None

    def init(self, memories: list[Tensor], state: dict[str, Tensor] | None) -> None:
        self._memory = RoutingMemory(memories, *self._settings)
        if state is not None:
            self._memory.restore(state)

    def pull(self, version: int) -> list[Tensor]:
        return [memory.detach() for memory in self._at(version).memories]

    def push(self, version: int, statistics: list[MemoryStatistics]) -> None:
        # One message for all layers: the masses are a column beside the sums.
        blocks = [torch.cat([layer.sum_ED, layer.mass_E[:, None]], 1) for layer in statistics]
        flat = all_reduce_sum(torch.cat([block.flatten() for block in blocks]), self._group)
        parts = flat.split([block.numel() for block in blocks])
        summed = [part.view_as(block) for part, block in zip(parts, blocks, strict=True)]
        self._at(version).step([MemoryStatistics(each[:, :-1], each[:, -1]) for each in summed])

    def snapshot(self, version: int) -> dict[str, Tensor]:
        return self._at(version).snapshot()

    def _at(self, version: int) -> RoutingMemory:
        if self._memory is None or self._memory.version != version:
            found = "no memory" if self._memory is None else f"version {self._memory.version}"
            raise RuntimeError(f"routing memory: version {version} was asked for, {found} is here")
        return self._memory
