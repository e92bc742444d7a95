"""The centres of k-means, ten starts: against one start and ten of scikit-learn's on the same thread, and on two ranks.

    python -m benchmarks.kmeans [--quick] [--json FILE]

Floor of one of Lloyd's passes: 2 · B · D · E flop for B rows, which one dense product of the same shape reaches.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from benchmarks.report import Row, main, seconds
from rbm_dist.moe.sparse_rows import unit
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.train.kmeans import assigned_sums, kmeans_centres

_WIDTH, _CENTRES = 128, 64


def measure(quick: bool) -> list[Row]:
    rows = 60_000 if quick else 1_000_000
    name = f"{rows:,} × {_WIDTH}, {_CENTRES} centres"
    x_BD = _rows(rows)
    with threadpool_limits(1):
        torch.set_num_threads(1)
        one_pass = seconds(lambda: assigned_sums(x_BD, x_BD[:_CENTRES]), 2)
        product = seconds(lambda: [chunk @ x_BD[:_CENTRES].T for chunk in x_BD.split(8192)], 2)
        start = time.perf_counter()
        centres = kmeans_centres(x_BD, np.arange(rows), _CENTRES, 0, Mesh.single())
        mine = time.perf_counter() - start
        peers = {}
        for starts in (1, 10):
            start = time.perf_counter()
            peer = KMeans(_CENTRES, n_init=starts, random_state=0).fit(x_BD.numpy())
            peers[starts] = time.perf_counter() - start, peer.inertia_
    found = _sum_of_squares(x_BD, centres)
    target = None if quick else 1.0  # of few rows the starts' sample is a large part
    one, two = _on_ranks(1, rows), _on_ranks(2, rows)
    return [
        Row(f"{name}: vs one start of scikit-learn's", mine, "s", peers[1][0] / mine, target),
        Row(f"{name}: vs ten of them", mine, "s", peers[10][0] / mine, target and 5 * target),
        Row(f"{name}: sum of squares vs that of ten", found, "", peers[10][1] / found, 0.99),
        Row(f"{name}: a pass, share of one dense product", one_pass, "s", product / one_pass, 0.4),
        # The starts are of a sample, whose size is the same however many rows there are.
        Row(f"{name}: two ranks vs one", two, "s", one / two, 1.2 if quick else 1.8),
    ]


def _rows(rows: int) -> torch.Tensor:
    """Of length 1, around 200 centres which are not told apart easily; `[rows, 128]`."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(200, _WIDTH, generator=generator)
    of = torch.randint(200, (rows,), generator=generator)
    x_BD = unit(centre[of] + 1.5 * torch.randn(rows, _WIDTH, generator=generator))
    assert isinstance(x_BD, torch.Tensor)
    return x_BD


def _sum_of_squares(x_BD: torch.Tensor, centres_ED: np.ndarray) -> float:
    centres = torch.from_numpy(centres_ED)
    return sum(torch.cdist(chunk, centres).min(1).values.square().sum().item() for chunk in x_BD.split(8192))


def _on_ranks(world_size: int, rows: int) -> float:
    """Seconds until the slowest rank has the centres; each has as many rows, and one thread."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, folder, rows), world_size)
        return max(float((Path(folder) / str(rank)).read_text()) for rank in range(world_size))


def _rank(rank: int, world_size: int, folder: str, rows: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    mesh, ids = Mesh.init(1, torch.device("cpu")), np.arange(rank, rows, world_size)
    x_BD = _rows(rows)[ids]
    warm = np.arange(rank, 1000, world_size)
    kmeans_centres(x_BD[: len(warm)], warm, 4, 0, mesh)
    dist.barrier()
    start = time.perf_counter()
    kmeans_centres(x_BD, ids, _CENTRES, 0, mesh)
    (Path(folder) / str(rank)).write_text(str(time.perf_counter() - start))
    dist.destroy_process_group()


if __name__ == "__main__":
    main("k-means of the routing memory, float32, one thread", measure)
