"""What a function holds: its process's RssAnon at the peak, over that before it began, watched from outside.

The process is fresh, but a fork of one that has imported everything; there the function first runs on something small,
so that what libraries keep once and for all is not counted.
"""

import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Calls = list[tuple[Callable[..., Any], tuple]]
_IMPORTED = ["rbm_dist.stages.local", "torch_geometric.nn", "sklearn.cluster", "torch.distributed.checkpoint"]


def held(warm: Calls, calls: Calls) -> tuple[list[Any], int]:
    """The results of some calls, and the bytes that they held at most, after other calls to warm up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, warm, calls))
    process.start()
    theirs.close()
    ours.recv()
    before = peak = _anonymous(process.pid)
    ours.send(None)
    while not ours.poll(0.002):
        peak = max(peak, _anonymous(process.pid))
    results = ours.recv()
    process.join()
    return results, peak - before


def _work(connection: Connection, warm: Calls, calls: Calls) -> None:
    import torch

    torch.set_num_threads(1)
    for function, arguments in warm:
        function(*arguments)
    connection.send(None)
    connection.recv()
    connection.send([function(*arguments) for function, arguments in calls])


def _anonymous(pid: int | None) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0
