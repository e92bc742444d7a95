"""The benchmark of GPUs goes through to its end; without one its figures say nothing."""

import math

import torch

from benchmarks.gpu import measure


def test_it_goes_through() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = measure(True, torch.device("cpu"), small=True)
    torch.set_num_threads(threads)
    assert len(rows) == 10
    assert all(math.isfinite(row.value) and math.isfinite(row.ratio) for row in rows)
