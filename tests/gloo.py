"""Run a function on several gloo ranks, each a process, and collect what every rank returns."""

import datetime
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.patience import patient

# Ranks are forked from a server that has imported the slow packages once.
mp.set_forkserver_preload(["rbm_dist.stages.student", "sklearn.cluster"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(rank, *args)` on `world_size` ranks of one gloo group; an exception on any rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver")
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=patient(60)),
    )  # fmt: skip
    dist.barrier()  # a rank that ends before another has connected would look like one that crashed
    try:
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(function(rank, *args)))
    finally:
        dist.destroy_process_group()
