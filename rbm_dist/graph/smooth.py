"""Smoothing of soft labels over edges, after the teacher and before the students: APPNP, and correct-and-smooth.

Both repeat `X ← damping · S · X + (1 − damping) · X0` with `S = D^-½ A D^-½` (Klicpera et al., 2019; Huang et al.,
2021), D the in-degrees on both sides, as PyG's `gcn_norm` has them. Of rows `U = D^-½ X`, S is the mean over
in-neighbours, which the store computes: the arrays `smooth0`, `smooth1`, … and `residual0`, … hold such rows. The last
becomes `soft`, where rows sum to one again, so that `D^½` is of no consequence.

Correct-and-smooth knows the labels of training nodes, and of no others. It first spreads what the teacher gets wrong on
them, which stays fixed there (the paper's FDiff-scale), adds that to the others' rows, and smooths with the labels in
place of the training nodes' rows. Unlike in the paper, whose results are of test nodes alone, training nodes keep what
the teacher said of them: no label reaches its own node, where students would otherwise mostly learn labels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np

from rbm_dist import storage
from rbm_dist.config.run import SmoothConfig, SoftLabelsConfig
from rbm_dist.graph.encodings import Step, batch_step, fill, make_arrays
from rbm_dist.graph.propagate import in_degree, mean_of_neighbours, unit_sum
from rbm_dist.graph.soft_rows import encode, layout
from rbm_dist.graph.splits import TRAIN, UNSEEN
from rbm_dist.graph.store import SOFT, GraphStore

UNSMOOTHED = "unsmoothed"
"""The teacher's class distributions, `[N, C]` float32, until they are smoothed."""
ARRAYS = rf"{UNSMOOTHED}|residual\d+|smooth\d+"
"""A regular expression of the names of all arrays that are made on the way."""


def smooths(settings: SoftLabelsConfig) -> bool:
    """Whether soft labels are smoothed."""
    return settings.smooth.method != "none"


def smooth(
    store: GraphStore, settings: SoftLabelsConfig, run_step: Callable[[Step], list[storage.FileInfo]] | None = None
) -> None:
    """Make the array `soft` of `unsmoothed`; what a run that was cut off had finished is kept, see `make_arrays`.

    `run_step` fills one step's array in all parts; default: here.
    """

    def here(step: Step) -> list[storage.FileInfo]:
        return fill(step, store, range(store.num_parts))

    make_arrays(store, _steps(settings, store.num_classes), [SOFT], run_step or here)


def _steps(settings: SoftLabelsConfig, num_classes: int) -> list[Step]:
    chosen = settings.smooth

    def step(name: str, needs: tuple[str, ...], batch: Callable[..., np.ndarray]) -> Step:
        return batch_step(name, num_classes, needs, batch)

    residuals = [f"residual{number}" for number in range(chosen.steps + 1)]
    smoothed = [f"smooth{number}" for number in range(chosen.steps)]
    first, steps = step(smoothed[0], (UNSMOOTHED,), _scaled), []
    if chosen.method == "correct_and_smooth":
        steps = [step(residuals[0], (UNSMOOTHED,), _residual)]
        steps += [step(name, (before,), _spread) for before, name in pairwise(residuals)]
        first = step(smoothed[0], (residuals[-1], UNSMOOTHED), _corrected)
    damped = partial(_damped, damping=chosen.damping)
    steps += [first, *(step(name, (before, smoothed[0]), damped) for before, name in pairwise(smoothed))]
    dtype, width = layout(settings.store, settings.top_m, num_classes)
    stored = partial(_last, chosen=chosen, store_as=partial(encode, store=settings.store, top_m=settings.top_m))
    last = step(SOFT, (smoothed[-1], smoothed[0], UNSMOOTHED), stored)
    return [*steps, replace(last, width=width, dtype=dtype.name)]


def _scaled(store: GraphStore, ids: np.ndarray, unsmoothed: str) -> np.ndarray:
    """`D^-½ Z`, of the teacher's rows Z."""
    return store.gather(unsmoothed, ids) / _root_degree(store, ids)


def _residual(store: GraphStore, ids: np.ndarray, unsmoothed: str) -> np.ndarray:
    """`D^-½ (Y − Z)` of training nodes, zeros of all others."""
    rows_nC = np.zeros((len(ids), store.num_classes), np.float32)
    train = _training(store, ids)
    rows_nC[train] = _labels(store, ids[train]) - store.gather(unsmoothed, ids[train])
    return rows_nC / _root_degree(store, ids)


def _spread(store: GraphStore, ids: np.ndarray, before: str) -> np.ndarray:
    rows_nC, train = _mean(store, ids, before), _training(store, ids)
    rows_nC[train] = store.gather(before, ids[train])
    return rows_nC


def _corrected(store: GraphStore, ids: np.ndarray, residual: str, unsmoothed: str) -> np.ndarray:
    """`D^-½` times the labels of training nodes, and of all others what the teacher said, corrected."""
    root_n1, train = _root_degree(store, ids), _training(store, ids)
    rows_nC = store.gather(unsmoothed, ids) + root_n1 * store.gather(residual, ids)
    rows_nC[train] = _labels(store, ids[train])
    return unit_sum(np.maximum(rows_nC, 0)) / root_n1


def _damped(store: GraphStore, ids: np.ndarray, before: str, first: str, damping: float) -> np.ndarray:
    return damping * _mean(store, ids, before) + (1 - damping) * store.gather(first, ids)


def _last(
    store: GraphStore, ids: np.ndarray, before: str, first: str, unsmoothed: str, chosen: SmoothConfig,
    store_as: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    rows_nC = unit_sum(_damped(store, ids, before, first, chosen.damping))
    if chosen.method == "correct_and_smooth":
        train = _training(store, ids)
        rows_nC[train] = store.gather(unsmoothed, ids[train])
    return store_as(rows_nC)


def _mean(store: GraphStore, ids: np.ndarray, name: str) -> np.ndarray:
    """The mean over in-neighbours; unseen nodes, which lead to each other alone, do not count."""
    rows_nC, unseen = mean_of_neighbours(store, name, ids), _unseen(store, ids)
    rows_nC[unseen] = mean_of_neighbours(store, name, ids[unseen], observed_only=True)
    return rows_nC


def _root_degree(store: GraphStore, ids: np.ndarray) -> np.ndarray:
    """`D^½`, `[n, 1]`; a node without in-neighbours counts as one with a single one."""
    degree_n, unseen = in_degree(store, ids), _unseen(store, ids)
    degree_n[unseen] = in_degree(store, ids[unseen], observed_only=True)
    return np.sqrt(np.maximum(degree_n, 1), dtype=np.float32)[:, None]


def _training(store: GraphStore, ids: np.ndarray) -> np.ndarray:
    return np.flatnonzero(store.gather("split", ids) == TRAIN)


def _unseen(store: GraphStore, ids: np.ndarray) -> np.ndarray:
    return np.flatnonzero(store.gather("split", ids) == UNSEEN)


def _labels(store: GraphStore, ids: np.ndarray) -> np.ndarray:
    """Labels as distributions, `[n, C]`."""
    return np.eye(store.num_classes, dtype=np.float32)[store.gather("label", ids)]
