"""Run functions on several gloo ranks, each a process, and collect what every rank returns."""

import datetime
import pickle
import tempfile
import traceback
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


class Ranks:
    """Ranks of one gloo group that stay: for many small questions, of which each takes milliseconds.

    A context manager. An exception on a rank fails the test, and ends the ranks.
    """

    def __init__(self, world_size: int):
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("forkserver")
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, self._folder.name, theirs)
            self._processes.append(context.Process(target=_staying_rank, args=arguments, daemon=True))
            self._pipes.append(ours)
            self._processes[-1].start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(rank, *args)` on all ranks."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(patient(60)), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        failed = [text for text, _ in answers if text]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]


def _staying_rank(rank: int, world_size: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((None, function(rank, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
