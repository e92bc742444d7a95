"""Neighbour sampling with relabelling: the built-in kernel against a vectorised torch sampler and, where installed,
pyg-lib and torch-sparse; CPU time of one thread, on a synthetic graph with skewed degrees. And two threads with a
sampler each against one, which can only be seen on the clock: run it on an idle machine with two free cores.

    python -m benchmarks.sampling [--quick] [--json FILE]

Floor: each sampled edge is one random read of `indices` and one of the relabelling map; both miss the caches on a large
graph, so the kernel is bound by memory latency.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.report import Row, main, seconds
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.sampler import NumbaSampler, Sampler
from rbm_dist.graph.sampler_backends import make_sampler

FANOUT = (15, 10, 5)
SEEDS = 1024
THREADS = 2


def synthetic(num_nodes: int, mean_degree: int) -> Csc:
    """Log-normal in-degrees; sources drawn with the square of a uniform number, so that some are popular."""
    rng = np.random.default_rng(0)
    degree = rng.lognormal(np.log(mean_degree) - 0.5, 1.0, num_nodes).astype(np.int64).clip(1, num_nodes // 10)
    indptr = np.zeros(num_nodes + 1, np.int64)
    np.cumsum(degree, out=indptr[1:])
    return Csc(indptr, (rng.random(indptr[-1]) ** 2 * num_nodes).astype(np.int32))


class TorchSampler:
    """Floyd's algorithm in vectorised torch operations, relabelling by `unique`: the peer."""

    def __init__(self, csc: Csc):
        self.indptr, self.indices = torch.from_numpy(csc.indptr), torch.from_numpy(csc.indices)

    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> int:
        """Sample; gives the number of edges."""
        torch.manual_seed(key)
        nodes = frontier = torch.from_numpy(seeds)
        edges = 0
        for width in fanout:
            low = self.indptr[frontier]
            degree = self.indptr[frontier + 1] - low
            all_of = degree <= width
            picked = torch.empty(len(frontier), width, dtype=torch.int64)
            for j in range(width):
                top = (degree - width + j).clamp_min(0)
                drawn = (torch.rand(len(frontier)) * (top + 1)).long()
                repeated = (picked[:, :j] == drawn[:, None]).any(1)
                picked[:, j] = torch.where(repeated, top, drawn)
            picked = torch.where(all_of[:, None], torch.arange(width), picked)
            valid = torch.arange(width) < degree.clamp(max=width)[:, None]
            sources = self.indices[(low[:, None] + picked)[valid]].long()
            edges += len(sources)
            known = len(nodes)
            unique, inverse = torch.unique(torch.cat([nodes, sources]), return_inverse=True)
            is_old = torch.zeros(len(unique), dtype=torch.bool)
            is_old[inverse[:known]] = True
            frontier = unique[~is_old]
            nodes = torch.cat([nodes, frontier])
        return edges


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    csc = synthetic(*((200_000, 25) if quick else (2_450_000, 47)))
    offsets = np.array([0, csc.num_nodes])
    budget_s = 3.0 if quick else 15.0
    batches = [np.random.default_rng(i).choice(csc.num_nodes, SEEDS, replace=False) for i in range(8)]

    def cost(sampler: Sampler | TorchSampler) -> float:
        """CPU seconds per batch."""
        calls = iter(range(10**9))

        def call() -> None:
            index = next(calls)
            sampler.sample(batches[index % len(batches)], FANOUT, index)

        return seconds(call, budget_s)

    own = NumbaSampler({0: csc}, offsets)
    edges = np.mean([sum(own.sample(batch, FANOUT, 0).edges_per_hop) for batch in batches])
    mine = cost(own)
    rows = [Row("vs vectorised torch", edges / mine / 1e6, "M edges per CPU s", cost(TorchSampler(csc)) / mine, 2.0)]
    rows.append(scaling([NumbaSampler({0: csc}, offsets) for _ in range(THREADS)], batches, 5 if quick else 15))
    for name, target in (("pyg_lib", 3.0), ("torch_sparse", 10.0)):
        try:
            rows.append(
                Row(
                    f"vs {name}",
                    edges / mine / 1e6,
                    "M edges per CPU s",
                    cost(make_sampler(name, {0: csc}, offsets)) / mine,
                    target,
                )
            )
        except InputError as error:
            print(f"{name} is left out: {error}")
    return rows


def scaling(samplers: list[NumbaSampler], batches: list[np.ndarray], turns: int) -> Row:
    """Edges per second of several threads against one; the ratio is per thread."""

    def edges(sampler: NumbaSampler) -> int:
        return sum(sum(sampler.sample(batch, FANOUT, key).edges_per_hop) for key, batch in enumerate(batches))

    def speed(pool: ThreadPoolExecutor, count: int) -> float:
        start = time.perf_counter()
        return sum(pool.map(edges, samplers[:count])) / (time.perf_counter() - start)

    with ThreadPoolExecutor(THREADS) as pool:
        speed(pool, THREADS)
        # By turns, so that what else the machine does falls on both.
        one, all_of = np.median([(speed(pool, 1), speed(pool, THREADS)) for _ in range(turns)], axis=0)
    # Of shared cores; of idle ones it is all of 1.
    return Row(f"{THREADS} threads vs 1, per thread", all_of / 1e6, "M edges per s", all_of / one / THREADS, 0.75)


if __name__ == "__main__":
    main("Neighbour sampling, fan-out [15, 10, 5], 1,024 seeds, relabelled", measure)
