"""Encodings: arrays that say what surrounds a node, for a student that sees no graph. All are built on propagation.

`pos` (`[N, positional_dim]` float32) says where a node lies: FastRP (Chen et al., 2019), or DeepWalk (Perozzi et al.,
2014) for graphs that fit in memory. `prop` (`[N, C]` float32) is what the training labels around it say: damped label
propagation (Zhou et al., 2004), a node's own label left out. An unseen node gets the mean of its observed
in-neighbours' encodings; it never changes anyone else's.

Each is a sequence of steps, and each step a new array of the store, so that a run that was cut off goes on from the
last finished part. Random values belong to a node's `orig_id`: no partition changes an encoding.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

import numpy as np
from numba import uint64, vectorize

from rbm_dist import storage
from rbm_dist.config.run import EncodingsConfig
from rbm_dist.graph.deepwalk import deepwalk
from rbm_dist.graph.propagate import SCALES, batches, mean_of_neighbours, unit_length, unit_sum
from rbm_dist.graph.shards import part_name
from rbm_dist.graph.splits import TRAIN, UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.bits import key, mix
from rbm_dist.randomness.words import Word

POS, PROP = "pos", "prop"
# A third of the entries of the random projection are not zero (Achlioptas, 2003). The paper's 1/√N would let unseen
# nodes change the others' encodings, and leaves most rows of a large graph empty.
_SPARSITY = 3
_SKIPPED_HOPS = 2  # FastRP gives the first hops no weight: on their own they are still close to the random projection


@dataclass(frozen=True)
class Step:
    """One new array. `make(store)` gives a function from a part to its rows, in chunks."""

    name: str
    width: int
    needs: tuple[str, ...]  # arrays of other steps that it reads
    make: Callable[[GraphStore], Callable[[int], Iterable[np.ndarray]]]
    together: bool = False  # whether all parts are made by one worker
    dtype: str = "float32"


def arrays(config: EncodingsConfig) -> list[str]:
    """The arrays that are configured."""
    return [POS] * (config.positional != "none") + [PROP] * config.label_propagation


def encode(
    store: GraphStore, config: EncodingsConfig, seed: int, run_step: Callable[[Step], list[storage.FileInfo]]
) -> None:
    """Add the configured arrays to the store. `run_step` fills one step's array in all parts, see `fill`."""
    make_arrays(store, _steps(config, seed, store.num_classes), arrays(config), run_step)


def make_arrays(
    store: GraphStore, steps: list[Step], wanted: list[str], run_step: Callable[[Step], list[storage.FileInfo]]
) -> None:
    """Take those of some steps, in their order, that the wanted arrays need.

    What a run that was cut off had finished is kept; arrays that no further step reads are removed.
    """
    needed, todo = set(wanted), []
    for step in reversed(steps):
        if step.name in needed and not storage.exists(_index(store, step.name)):
            todo.append(step)
            needed.update(step.needs)
    while todo:
        step = todo.pop()
        store.publish(step.name, run_step(step))
        for name in set(step.needs).difference(*(later.needs for later in todo)):
            store.remove(name)
    for name in {step.name for step in steps}.difference(wanted):
        store.remove(name)


def encode_in_process(store: GraphStore, config: EncodingsConfig, seed: int) -> None:
    """Add the configured arrays to the store, in this process."""
    encode(store, config, seed, lambda step: fill(step, store, range(store.num_parts)))


def fill(step: Step, store: GraphStore, parts: Iterable[int]) -> list[storage.FileInfo]:
    """Write a step's array for some parts; a part that is there is kept, for a file appears whole or not at all."""
    rows, files = step.make(store), []
    for part in parts:
        url = storage.join(store.url, part_name(part), f"{step.name}.npy")
        if storage.exists(url):
            files.append(storage.file_info(url))
        else:
            files.append(store.write_part(step.name, part, np.dtype(step.dtype), (step.width,), rows(part)))
    return files


def _index(store: GraphStore, name: str) -> str:
    return storage.join(store.url, f"{name}.json")


def _steps(config: EncodingsConfig, seed: int, num_classes: int) -> list[Step]:
    """All steps of a configuration, each after those it reads."""
    steps = []
    if config.positional == "fastrp":
        steps += _fastrp_steps(config.positional_dim, config.hops, seed)
    elif config.positional == "deepwalk":
        make = partial(deepwalk, dim=config.positional_dim, seed=seed)
        steps.append(Step(f"{POS}_observed", config.positional_dim, (), make, together=True))
    if config.label_propagation:
        steps += _label_steps(config, num_classes, seed)
    widths = {POS: config.positional_dim, PROP: num_classes}
    for name in arrays(config):
        steps.append(batch_step(name, widths[name], (f"{name}_observed",), partial(_with_unseen, scale=SCALES[name])))
    return steps


Batch = Callable[..., np.ndarray]
"""`(store, ids, *needs) -> [n, D]`: the rows of a batch of nodes, from the arrays of this name."""


def batch_step(name: str, width: int, needs: tuple[str, ...], batch: Batch) -> Step:
    """A step that goes through a part's nodes in batches."""
    return Step(name, width, needs, partial(_by_batches, width=width, needs=needs, batch=batch))


def _by_batches(
    store: GraphStore, width: int, needs: tuple[str, ...], batch: Batch
) -> Callable[[int], Iterator[np.ndarray]]:
    return lambda part: (batch(store, ids, *needs) for ids in batches(store.ids(part), width))


def _with_unseen(
    store: GraphStore, ids: np.ndarray, observed: str, scale: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The encodings of observed nodes as they are, of unseen ones from their observed in-neighbours."""
    rows_nD = store.gather(observed, ids)
    unseen = store.gather("split", ids) == UNSEEN
    rows_nD[unseen] = scale(mean_of_neighbours(store, observed, ids[unseen], observed_only=True))
    return rows_nD


# FastRP: H_0 a random projection, H_k = normalise(P · H_(k−1)) for the mean over neighbours P, pos = normalise(Σ H_k).


def _fastrp_steps(dim: int, hops: int, seed: int) -> list[Step]:
    names = tuple(f"{POS}_hop{hop}" for hop in range(hops + 1))
    summed = names[1 + min(_SKIPPED_HOPS, hops - 1) :]
    return [
        batch_step(names[0], dim, (), partial(_random_projection, dim=dim, seed=seed)),
        *(batch_step(name, dim, (before,), _hop) for before, name in pairwise(names)),
        batch_step(f"{POS}_observed", dim, summed, _sum_of_hops),
    ]


def _random_projection(store: GraphStore, ids: np.ndarray, dim: int, seed: int) -> np.ndarray:
    row_key_n = _mix(np.uint64(key(seed, Word.PROJECTION)), store.gather("orig_id", ids).astype(np.uint64))
    drawn_nD = _mix(row_key_n[:, None], np.arange(dim, dtype=np.uint64)) % np.uint64(2 * _SPARSITY)
    values = np.zeros(2 * _SPARSITY, np.float32)
    values[:2] = _SPARSITY**0.5, -(_SPARSITY**0.5)
    return values[drawn_nD]


def _hop(store: GraphStore, ids: np.ndarray, before: str) -> np.ndarray:
    return unit_length(mean_of_neighbours(store, before, ids))


def _sum_of_hops(store: GraphStore, ids: np.ndarray, *hops: str) -> np.ndarray:
    return unit_length(reduce(np.add, (store.gather(name, ids) for name in hops)))


# Label propagation: F ← damping · P · F + (1 − damping) · Y. It is linear in the labels, so each group of training
# nodes has C columns of its own. A training node gets the sum over the other groups, any other node over all groups.


def _label_steps(config: EncodingsConfig, num_classes: int, seed: int) -> list[Step]:
    width = num_classes * config.folds
    names = tuple(f"{PROP}_step{step}" for step in range(config.iterations + 1))
    start = partial(_labels_by_fold, folds=config.folds, seed=seed)
    damped = partial(_damped_step, damping=config.damping, start=start)
    return [
        batch_step(names[0], width, (), start),
        *(batch_step(name, width, (before,), damped) for before, name in pairwise(names)),
        batch_step(f"{PROP}_observed", num_classes, names[-1:], partial(_other_folds, folds=config.folds, seed=seed)),
    ]


def _fold(store: GraphStore, ids: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The group of each training node, −1 for all other nodes, `[n]`."""
    drawn = _mix(np.uint64(key(seed, Word.LABEL_FOLD)), store.gather("orig_id", ids).astype(np.uint64))
    return np.where(store.gather("split", ids) == TRAIN, (drawn % np.uint64(folds)).astype(np.int64), -1)


def _labels_by_fold(store: GraphStore, ids: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Y: one-hot training labels, each in its group's columns, `[n, folds · C]`."""
    y_nGC = np.zeros((len(ids), folds, store.num_classes), np.float32)
    fold = _fold(store, ids, folds, seed)
    train = np.flatnonzero(fold >= 0)
    y_nGC[train, fold[train], store.gather("label", ids[train])] = 1
    return y_nGC.reshape(len(ids), -1)


def _damped_step(store: GraphStore, ids: np.ndarray, before: str, damping: float, start: Batch) -> np.ndarray:
    return damping * mean_of_neighbours(store, before, ids) + (1 - damping) * start(store, ids)


def _other_folds(store: GraphStore, ids: np.ndarray, last: str, folds: int, seed: int) -> np.ndarray:
    f_nGC = store.gather(last, ids).reshape(len(ids), folds, store.num_classes)
    fold = _fold(store, ids, folds, seed)
    train = np.flatnonzero(fold >= 0)
    f_nGC[train, fold[train]] = 0
    return unit_sum(f_nGC.sum(1))


@vectorize([uint64(uint64, uint64)], cache=True)
def _mix(state: np.uint64, word: np.uint64) -> np.uint64:
    """`mix` over whole arrays."""
    return mix(state, word)
