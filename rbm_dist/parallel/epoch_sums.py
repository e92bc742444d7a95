"""What an epoch's figures are made of: sums over its steps, which survive in checkpoints made in its middle."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures


class EpochSums:
    """One rank's sums of the epoch under way, in float64, where the terms are: no step waits for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor | float]) -> None:
        """Add a step's terms, of any shapes. Names are the same in all steps and on all ranks."""
        for name, term in terms.items():
            value = torch.as_tensor(term, dtype=torch.float64).detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def total(self, mesh: Mesh) -> dict[str, Tensor]:
        """The sums over all ranks, in CPU memory."""
        if not self._sums:
            return {}
        flat = torch.cat([each.cpu().flatten() for each in self._sums.values()])
        summed = torch.tensor(sum_figures(flat.tolist(), mesh), dtype=torch.float64)
        parts = summed.split([each.numel() for each in self._sums.values()])
        return {name: part.view(each.shape) for (name, each), part in zip(self._sums.items(), parts, strict=True)}

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {name: each.tolist() for name, each in self._sums.items()}

    def restore(self, states: list[dict[str, Any]], mesh: Mesh) -> None:
        """Go on from what `state` gave on every rank. Another number of ranks shares the sums out."""
        mine = states[mesh.rank :: mesh.world_size]
        zeros = {name: torch.zeros_like(_tensor(value)) for name, value in states[0].items()}
        self._sums = {name: sum((_tensor(each[name]) for each in mine), zero) for name, zero in zeros.items()}

    def clear(self) -> None:
        """The next epoch begins."""
        self._sums = {}


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
