"""How many ranks share one set of experts, where the configuration leaves it open.

With a set of its own, a rank holds all experts, and sums all their gradients with the others in every step. Where g
ranks share a set, either is a g-th of that, but rows travel to their experts and back. What is chosen fits into memory
and is least on the wire, at a rate that is measured; a set for each rank, unless sharing is clearly less: ranks that
share experts wait for the one with most rows.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rbm_dist.config.run import Config, each_has_experts
from rbm_dist.graph.partition import available_memory
from rbm_dist.moe.collectives import summed
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.training_checkpoints import copies_of_parameters

_SHARE = 0.5  # of what is free, that experts may take
_CLEARLY = 0.5  # of the time on the wire of the fewest ranks per set
_MESSAGES = 9  # of a layer: counts, experts, weights, keys, rows and sums, and the gradients of three of them
_TIMED_BYTES, _TIMES = 4 << 20, 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wire:
    """What exchanges between the ranks take."""

    call_s: float  # however little is sent
    bytes_per_s: float  # that a rank sends


@dataclass(frozen=True)
class Layout:
    """What it takes that so many ranks share a set of experts."""

    expert_parallel: int
    held: float  # bytes on each rank, with all copies
    exchange_s: float  # of a step


def share_experts(mesh: Mesh, config: Config, widths: Sequence[tuple[int, int]]) -> Mesh:
    """The ranks of `mesh`, laid out for students whose layers have these inputs and outputs.

    Every rank must call it. Nothing changes if it is laid out already, or the configuration says how it is to be.
    """
    if config.cluster.expert_parallel != "auto" or mesh.world_size == 1 or mesh.expert_parallel > 1:
        return mesh
    wire, free = measured_wire(mesh), min(mesh.gather(_free(mesh)))
    settings = config.student
    chosen, each = choose(
        layouts(
            widths, settings.num_experts, settings.top_k, settings.batch_size, mesh.world_size,
            copies_of_parameters(settings.average > 0), wire,
        ),
        _SHARE * free,
    )  # fmt: skip
    if mesh.rank == 0:
        _log.info(
            "experts %s: %.0f of %.0f MB free, %.1f ms a step on the wire, at %.0f MB/s; %s: %.0f MB, %.1f ms",
            _named(chosen.expert_parallel), chosen.held / 1e6, free / 1e6, 1e3 * chosen.exchange_s,
            wire.bytes_per_s / 1e6, _named(each.expert_parallel), each.held / 1e6, 1e3 * each.exchange_s,
        )  # fmt: skip
    return mesh.sharing(chosen.expert_parallel)


def _named(group: int) -> str:
    return "all on each rank" if group == 1 else f"shared by {group} ranks"


def layouts(
    widths: Sequence[tuple[int, int]], num_experts: int, top_k: int, rows: int, ranks: int, copies: int, wire: Wire
) -> list[Layout]:  # fmt: skip
    """The layouts of so many ranks in which each has experts, by how many share a set.

    widths: inputs and outputs of each layer. rows: of a step, over all ranks. copies: of a parameter in memory.
    """
    found = []
    for group in range(1, ranks + 1):
        if ranks % group or not each_has_experts(group, num_experts):
            continue
        parameters = 4 * -(-num_experts // group) * sum((d + 1) * o for d, o in widths)
        replicas = ranks // group
        calls, sent = float(replicas > 1), 2 * (1 - 1 / replicas) * parameters
        if group > 1:
            others = (group - 1) * (1 - (1 - 1 / group) ** top_k)  # ranks that a row goes to beside its own
            calls += _MESSAGES * len(widths)
            sent += 2 * 4 * rows / ranks * others * sum(d + o for d, o in widths)
        found.append(Layout(group, copies * parameters, calls * wire.call_s + sent / wire.bytes_per_s))
    return found


def choose(found: list[Layout], memory: float) -> tuple[Layout, Layout]:
    """The layout to take, and the one that it was weighed against: the other of least exchange, or itself.

    If none fits into `memory`, it is the smallest.
    """
    fitting = [each for each in found if each.held <= memory] or found[-1:]
    fewest, least = fitting[0], min(fitting, key=lambda each: each.exchange_s)
    if least.exchange_s < _CLEARLY * fewest.exchange_s:
        return least, fewest
    others = [each for each in found if each is not fewest]
    return fewest, min(others, key=lambda each: each.exchange_s, default=fewest)


def measured_wire(mesh: Mesh) -> Wire:
    """Measured with sums over all ranks; equal on all of them. Every rank must call it; takes less than a second."""

    def seconds(size: int) -> float:
        numbers, spent = torch.zeros(size, device=mesh.device), []
        for _ in range(_TIMES):
            mesh.barrier()
            start = time.perf_counter()
            assert mesh.world_group is not None
            summed(numbers, mesh.world_group)[:1].tolist()  # waits for a GPU
            spent.append(time.perf_counter() - start)
        return sorted(spent)[_TIMES // 2]

    call_s, both_s = mesh.broadcast((seconds(1), seconds(_TIMED_BYTES // 4)))
    sent = 2 * (1 - 1 / mesh.world_size) * _TIMED_BYTES
    return Wire(call_s, sent / max(both_s - call_s, both_s / 2))  # where calls vary more than bytes take


def _free(mesh: Mesh) -> float:
    """Bytes that this rank may still take."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.mem_get_info(mesh.device)[0])
    return available_memory() / mesh.hosts.count(mesh.hosts[mesh.rank])
