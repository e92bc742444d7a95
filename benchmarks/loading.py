"""Mini-batches for the trainer, sampled and with 100 features gathered: made ahead by a thread against made between the
steps, where a training step takes as long as a batch; and the batch alone against PyG's NeighborLoader where installed.

    python -m benchmarks.loading [--quick] [--json FILE]

Floor: batches ahead of steps of equal length halve the time (ratio 2). A step on the CPU needs a second free core for
that, and shares the memory's bandwidth; a step on a GPU (here: a sleep) does not. The overlap can only be seen on the
clock, so run it on an idle machine; its price is seen in CPU time.
"""

import functools
import time
from collections.abc import Callable
from itertools import chain, cycle, repeat

import numpy as np
import torch

from benchmarks.report import Row, main, seconds
from benchmarks.sampling import FANOUT, SEEDS, synthetic
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.sampler import NumbaSampler

FEATURES = 100
BATCHES = 10
_SIDE = 512  # of the matrices whose products are the training step


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)  # two threads in all: the trainer's and the loader's
    csc = synthetic(*((200_000, 25) if quick else (2_450_000, 47)))
    feat_NF = np.random.default_rng(1).random((csc.num_nodes, FEATURES), np.float32)
    seeds = [np.random.default_rng(i).choice(csc.num_nodes, SEEDS, replace=False) for i in range(8)]
    sampler = NumbaSampler({0: csc}, np.array([0, csc.num_nodes]))
    budget_s = 3.0 if quick else 15.0

    def batch(index: int) -> np.ndarray:
        return feat_NF[sampler.sample(seeds[index % len(seeds)], FANOUT, index).nodes]

    indices = cycle(range(len(seeds)))
    batch_s = seconds(lambda: batch(next(indices)), budget_s)
    a, b = torch.rand(2, _SIDE, _SIDE)
    products = max(1, round(batch_s / seconds(lambda: a @ b, 0.5)))
    jobs = [functools.partial(batch, index) for index in range(BATCHES)]

    def on_cpu() -> None:
        for _ in range(products):
            a @ b

    def epoch(step: Callable[[], None], depth: int) -> tuple[float, float]:
        """Seconds on the clock and of the CPU, per batch and step."""
        start, cpu = time.perf_counter(), time.process_time()
        with Prefetch("batches", jobs, timeout_s=60, depth=depth) as batches:
            for _ in batches:
                step()
        return (time.perf_counter() - start) / BATCHES, (time.process_time() - cpu) / BATCHES

    rows = []
    for where, step in (("CPU", on_cpu), ("GPU", functools.partial(time.sleep, batch_s))):
        # By turns, so that what else the machine does falls on both.
        turns = [(epoch(step, 2), epoch(step, 0)) for _ in range(3 if quick else 7)]
        (ahead_s, ahead_cpu), (inline_s, inline_cpu) = np.median(turns, axis=0)
        # Of a batch of milliseconds, handing it from thread to thread is a share; of a large graph's it is none.
        overlap, price = (None, None) if quick else (1.5 if where == "CPU" else 1.6, 0.9)
        rows += [
            Row(f"ahead vs inline, step on a {where}", 1 / ahead_s, "steps per s", inline_s / ahead_s, overlap),
            Row(f"its price, step on a {where}", ahead_cpu * 1e3, "CPU ms per step", inline_cpu / ahead_cpu, price),
        ]
    try:
        peer = neighbor_loader(csc, feat_NF, seeds)
        rows.append(
            Row("vs PyG NeighborLoader", batch_s * 1e3, "CPU ms per batch", seconds(peer, budget_s) / batch_s, 2.0)
        )
    except ImportError as error:
        print(f"PyG's NeighborLoader is left out, which needs pyg-lib or torch-sparse: {error}")
    return rows


def neighbor_loader(csc: Csc, feat_NF: np.ndarray, seeds: list[np.ndarray]) -> Callable[[], object]:
    """Gives the peer's next batch. Raises `ImportError`."""
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader

    dst = np.repeat(np.arange(csc.num_nodes), np.diff(csc.indptr))
    data = Data(x=torch.from_numpy(feat_NF), edge_index=torch.from_numpy(np.stack([csc.indices.astype(np.int64), dst])))
    loader = NeighborLoader(
        data, list(FANOUT), input_nodes=torch.from_numpy(np.concatenate(seeds)), batch_size=SEEDS, is_sorted=True
    )
    next(iter(loader))
    return functools.partial(next, chain.from_iterable(repeat(loader)))


if __name__ == "__main__":
    main("Mini-batches, fan-out [15, 10, 5], 1,024 seeds, 100 features", measure)
