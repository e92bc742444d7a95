"""What students learn from: their inputs, and what is known of each row, as complete batches.

Rows are read from the store by a thread that works ahead of the steps; or, on a GPU that has room for all that this
rank ever needs, once, and from then on taken where the model is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rbm_dist.config.run import StudentConfig
from rbm_dist.distill.krd import Pairs
from rbm_dist.distill.losses import Batch
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.splits import TRAIN
from rbm_dist.graph.store import GraphStore
from rbm_dist.moe.sparse_rows import Rows, SparseRows, dense, to_rows
from rbm_dist.randomness.rows import derive_keys
from rbm_dist.train.part_batches import PartBatches, joined
from rbm_dist.train.reliable_pairs import ReliablePairs

_CPU = torch.device("cpu")
_CHUNK = 65_536  # rows that are on their way to a GPU at a time
_SHARE = 0.5  # of a GPU's free memory that rows may take
_T = TypeVar("_T")
Labelled = tuple[Rows, Tensor]
"""Some rows and their labels, known to training or not."""


@dataclass(frozen=True)
class Drawn:
    """What makes a batch."""

    step: int  # of the epoch
    shares: list[np.ndarray]  # the nodes that each of this rank's parts gives
    dropout: int  # 64 random bits for the dropout of the step,
    pairs: int  # and for KRD's pairs


class StudentRows:
    """The rows of this rank's nodes, for a model on `device` in `dtype`. With `pairs`, batches have KRD's, too."""

    def __init__(
        self, store: GraphStore, settings: StudentConfig, device: torch.device, dtype: torch.dtype, timeout_s: float,
        pairs: ReliablePairs | None = None,
    ):  # fmt: skip
        self._store, self._settings, self._device, self._dtype, self._pairs = store, settings, device, dtype, pairs
        self._timeout_s = timeout_s
        self._names = ("soft", "hidden") if settings.similarity > 0 else ("soft",)
        self._ids = np.empty(0, np.int64)
        self._kept: dict[str, Tensor] = {}

    def keep(self, *ids: np.ndarray, budget: int | None = None) -> bool:
        """Read the rows of all these nodes once, if they fit into `budget` bytes of the device; whether they do.

        By default half of what a GPU has free, and nothing on a CPU, where files are mapped into memory anyway.
        """
        if budget is None:
            budget = int(_SHARE * torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else 0
        if not budget:
            return False
        every = np.unique(np.concatenate(ids))
        width = self._store.width((*self._settings.inputs, *self._names))
        if len(every) * (width * torch.empty((), dtype=self._dtype).element_size() + 16) > budget:
            return False
        kept: dict[str, Tensor] = {}
        for name in ("inputs", "label", "split", *self._names):
            for start in range(0, max(len(every), 1), _CHUNK):
                chunk = every[start : start + _CHUNK]
                rows = dense(self._rows(chunk)) if name == "inputs" else self._take(name, chunk)
                if not start:
                    kept[name] = torch.empty((len(every), *rows.shape[1:]), dtype=rows.dtype, device=self._device)
                kept[name][start : start + _CHUNK].copy_(rows)
        self._kept, self._ids = kept, every
        return True

    def inputs(self, ids: np.ndarray) -> Rows:
        """Where the model is."""
        return self._to_device(self._rows(ids))

    def batches(self, what: str, of: PartBatches, steps: Iterable[Drawn]) -> Prefetch[Batch]:
        """A batch for each of some steps of an epoch of `of`."""
        jobs = (partial(self._batch, joined(each.shares), of.global_rows(each.step), each) for each in steps)
        ahead = 2 if self._pairs or not self._kept else 0
        return Prefetch(f"{what}: batches", jobs, self._timeout_s, ahead, self._to_device)

    def labelled(self, what: str, of: PartBatches) -> Prefetch[Labelled]:
        """All rows in ascending order, a step at a time, with their labels."""
        jobs = (partial(self._labelled, joined(shares)) for shares in of.epoch(0, None))
        ahead = 0 if self._kept else 2
        return Prefetch(f"{what}: batches for validation", jobs, self._timeout_s, ahead, self._to_device)

    def _batch(self, ids: np.ndarray, global_rows: int, drawn: Drawn) -> Batch:
        label_B, split_B = self._take("label", ids), self._take("split", ids)
        pairs = self._pairs.draw(ids, drawn.pairs, self._dtype) if self._pairs else None
        return Batch(
            x_BF=self._rows(ids),
            label_B=torch.where(split_B == TRAIN, label_B, -1),
            key_B=derive_keys(drawn.dropout, self._pinned(torch.from_numpy(ids))),
            soft_BC=pairs.soft_nC[: len(ids)] if pairs else self._take("soft", ids),
            global_rows=global_rows,
            hidden_BT=self._take("hidden", ids) if "hidden" in self._names else None,
            pairs=pairs,
        )

    def _labelled(self, ids: np.ndarray) -> Labelled:
        return self._rows(ids), self._take("label", ids)

    def _rows(self, ids: np.ndarray) -> Rows:
        """Inputs where they are kept, else in CPU memory."""
        if self._kept:
            return self._take("inputs", ids)
        rows = self._store.inputs(ids, self._settings.inputs)
        if self._device.type != "cpu" and not isinstance(rows, np.ndarray):
            rows = rows.toarray()
        rows_BF = to_rows(rows, _CPU, self._dtype)
        return self._pinned(rows_BF) if isinstance(rows_BF, Tensor) else rows_BF

    def _take(self, name: str, ids: np.ndarray) -> Tensor:
        """Rows of an array where they are kept, else in CPU memory."""
        if self._kept:
            return self._kept[name][self._to_device(torch.from_numpy(np.searchsorted(self._ids, ids)))]
        rows = torch.from_numpy(self._store.gather(name, ids))
        return self._pinned(rows.to(self._dtype) if rows.is_floating_point() else rows)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """In memory from which it moves to a GPU while that computes."""
        return tensor if self._device.type == "cpu" else tensor.pin_memory()

    def _to_device(self, value: _T) -> _T:
        """A tensor, or all tensors in a batch or tuple, where the model is."""
        moved: Any = value
        if self._device.type == "cpu" or isinstance(value, SparseRows):
            return value
        if isinstance(value, Tensor):
            moved = value.to(self._device, non_blocking=True)
        elif isinstance(value, tuple):
            moved = tuple(map(self._to_device, value))
        elif isinstance(value, Batch | Pairs):
            moved = replace(value, **{name: self._to_device(each) for name, each in vars(value).items()})
        return moved
