"""Where a routing memory starts: the centres of k-means over rows that all ranks hold some of.

scikit-learn clusters a sample, from several seeds, which are shared out among the ranks. From the best of these starts
Lloyd's iterations go on over all rows: each rank goes through its own, and sends `E · D` numbers per iteration.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from rbm_dist.moe.collectives import summed
from rbm_dist.moe.sparse_rows import Rows, to_scipy
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.randomness.bits import generator, key
from rbm_dist.randomness.words import Word

STARTS = 10
_SAMPLE, _SAMPLE_PER_CENTRE = 10_000, 100  # rows that the starts are made of: at least, and for each centre
_CHUNK = 8192  # rows whose distances are held at a time
_ITERATIONS, _TOLERANCE = 300, 1e-4  # at most; moved by less than this share of the variance: scikit-learn's
_SAME = 1e-6  # starts whose sums of squares differ by less have found the same clusters


def kmeans_centres(rows_BD: Rows, ids_B: np.ndarray, num_experts: int, seed: int, mesh: Mesh) -> np.ndarray:
    """The centres over the rows of all ranks, `[E, D]`, in the rows' dtype; equal on every rank.

    Every rank must call it, with its own rows and their ids; it may have none. Ranks and the order of rows make no
    difference but rounding. Fewer distinct rows than experts: the rows there are, again and again. Centres come in the
    order of the ids of their rows: parts and experts are dealt to ranks in order, so that where experts are sharded and
    parts are communities a row mostly finds its expert on its own rank.
    """
    everyone = np.sort(np.concatenate(mesh.gather(ids_B)))
    size = sample_rows(len(everyone), num_experts)
    chosen = (
        everyone if len(everyone) == size else generator(seed, Word.KMEANS_SAMPLE).choice(everyone, size, replace=False)
    )
    centres = _cluster(_gather(rows_BD, ids_B, chosen, mesh), num_experts, seed, mesh)
    like = rows_BD if isinstance(rows_BD, Tensor) else rows_BD.value_n
    centres_ED = torch.from_numpy(centres).to(like)
    if size < len(everyone):  # or scikit-learn has seen all
        centres_ED = _lloyd(rows_BD, centres_ED, mesh)
    return centres_ED[_by_place(rows_BD, ids_B, centres_ED, mesh)].cpu().numpy()


def sample_rows(rows: int, num_experts: int) -> int:
    """Rows that the starts are made of, of so many."""
    return min(rows, max(_SAMPLE, _SAMPLE_PER_CENTRE * num_experts))


def _gather(rows_BD: Rows, ids_B: np.ndarray, chosen: np.ndarray, mesh: Mesh) -> np.ndarray | sp.csr_array:
    """The chosen rows of all ranks, by id."""
    mine = np.flatnonzero(np.isin(ids_B, chosen))
    shares = mesh.gather((ids_B[mine], to_scipy(rows_BD[torch.from_numpy(mine)])))
    order = np.argsort(np.concatenate([ids for ids, _ in shares]))
    rows = [each for _, each in shares]
    return (np.concatenate(rows) if isinstance(rows[0], np.ndarray) else sp.vstack(rows, "csr"))[order]


def _cluster(rows_SD: np.ndarray | sp.csr_array, num_experts: int, seed: int, mesh: Mesh) -> np.ndarray:
    """The centres of the sample with the least sum of squares; the starts are dealt to the ranks."""
    from sklearn.cluster import KMeans  # takes seconds to import

    distinct = _distinct(rows_SD, num_experts + 1)
    if len(distinct) <= num_experts:
        return distinct[np.arange(num_experts) % len(distinct)]
    found = []
    for start in range(mesh.rank, STARTS, mesh.world_size):
        with threadpool_limits(limits=1):  # several threads add up in the order they come, and runs would differ
            each = KMeans(num_experts, n_init=1, random_state=key(seed, Word.KMEANS_START, start) % 2**31).fit(rows_SD)
        found.append((start, each.inertia_, each.cluster_centers_))
    found = sorted((each for share in mesh.gather(_best(found)) for each in share), key=lambda each: each[0])
    return _best(found)[0][2]


def _distinct(rows_SD: np.ndarray | sp.csr_array, enough: int) -> np.ndarray:
    """Distinct rows, at most so many."""
    found: dict[bytes, np.ndarray] = {}
    for index in range(rows_SD.shape[0]):
        row = rows_SD[[index]]
        row = row if isinstance(row, np.ndarray) else row.toarray()
        found.setdefault(row.tobytes(), row)
        if len(found) == enough:
            break
    return np.concatenate(list(found.values()))


def _best(found: list[tuple[int, float, np.ndarray]]) -> list[tuple[int, float, np.ndarray]]:
    """The first start that is as good as the best, whatever the rounding; none of none."""
    least = min((inertia for _, inertia, _ in found), default=0.0)
    return [each for each in found if each[1] <= least * (1 + _SAME)][:1]


def _lloyd(rows_BD: Rows, centres_ED: Tensor, mesh: Mesh) -> Tensor:
    """Move the centres to the means of the rows nearest to them, until they stand."""
    width = centres_ED.shape[1]
    squares = _sum(_squares(rows_BD), mesh)
    for _ in range(_ITERATIONS):
        # A column for the number of rows makes one message of both.
        total_ED = _sum(torch.cat(assigned_sums(rows_BD, centres_ED), 1), mesh)
        sum_ED, count_E = total_ED[:, :width], total_ED[:, width:]
        count = count_E.sum()
        variance = (squares / count - (sum_ED.sum(0) / count).square().sum()) / width
        before_ED = centres_ED.double()
        moved_ED = torch.where(count_E > 0, sum_ED / count_E.clamp_min(1), before_ED)
        centres_ED = moved_ED.to(centres_ED.dtype)
        if (moved_ED - before_ED).square().sum() <= _TOLERANCE * variance:
            break
    return centres_ED


def _by_place(rows_BD: Rows, ids_B: np.ndarray, centres_ED: Tensor, mesh: Mesh) -> Tensor:
    """The centres in the order of their rows' mean ids, those without rows last; `[E]`."""
    total_2E = centres_ED.new_zeros(2, len(centres_ED), dtype=torch.float64)
    id_B = torch.from_numpy(ids_B).to(total_2E)
    for at, _, nearest_B in _nearest(rows_BD, centres_ED):
        total_2E.index_add_(1, nearest_B, torch.stack([id_B[at], torch.ones_like(id_B[at])]))
    sum_E, count_E = _sum(total_2E, mesh)
    return torch.where(count_E > 0, sum_E / count_E, torch.inf).argsort(stable=True)


def assigned_sums(rows_BD: Rows, centres_ED: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the rows nearest to each centre, `[E, D]`, and how many they are, `[E, 1]`, in float64."""
    sum_ED = torch.zeros_like(centres_ED, dtype=torch.float64)
    count_E = sum_ED.new_zeros(len(sum_ED))
    for _, chunk_BD, nearest_B in _nearest(rows_BD, centres_ED):
        if isinstance(chunk_BD, Tensor):
            sum_ED += torch.zeros_like(centres_ED).index_add_(0, nearest_B, chunk_BD)
        else:
            place_n = nearest_B[chunk_BD.row_n] * chunk_BD.width + chunk_BD.column_n
            sum_ED.view(-1).index_add_(0, place_n, chunk_BD.value_n.double())
        count_E.index_add_(0, nearest_B, torch.ones_like(nearest_B, dtype=torch.float64))
    return sum_ED, count_E[:, None]


def _nearest(rows_BD: Rows, centres_ED: Tensor) -> Iterator[tuple[slice, Rows, Tensor]]:
    """Some rows at a time, and the centre that each is nearest to."""
    weight_DE, half_E = centres_ED.T.contiguous(), centres_ED.square().sum(1) / 2
    for start in range(0, len(rows_BD), _CHUNK):
        at = slice(start, start + _CHUNK)
        chunk_BD = rows_BD[at]
        if isinstance(chunk_BD, Tensor):
            yield at, chunk_BD, torch.addmm(-half_E, chunk_BD, weight_DE).max(1).indices
        else:
            yield at, chunk_BD, (chunk_BD.matmul(weight_DE) - half_E).max(1).indices


def _squares(rows_BD: Rows) -> Tensor:
    values = rows_BD if isinstance(rows_BD, Tensor) else rows_BD.value_n
    return sum((each.square().sum(dtype=torch.float64) for each in values.split(_CHUNK)), values.new_zeros(()).double())


def _sum(total: Tensor, mesh: Mesh) -> Tensor:
    return total if mesh.world_group is None else summed(total, mesh.world_group)
