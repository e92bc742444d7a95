"""A teacher without sampling: SIGN (Frasca et al., 2020), a network on features averaged over more and more hops."""

import torch
from torch import Tensor, nn

from rbm_dist.models.norm import make_norm
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.randomness.rows import derive_keys


class Sign(nn.Module):
    """A linear map per hop, side by side, then a hidden layer and the classes; norm and ReLU, then dropout, between."""

    def __init__(self, num_features: int, hidden: int, num_classes: int, hops: int, dropout: float, norm: str = "none"):
        super().__init__()
        self.num_features, self.dropout = num_features, dropout
        self.branches = nn.ModuleList(nn.Linear(num_features, hidden) for _ in range(hops + 1))
        self.branch_norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(hops + 1))
        self.joined, self.norm = nn.Linear(hidden * (hops + 1), hidden), make_norm(norm, hidden)
        self.classes = nn.Linear(hidden, num_classes)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))  # of the logits; set by calibration

    def forward(self, rows_nD: Tensor, key_n: Tensor | None = None) -> Tensor:
        """Logits `[n, classes]`; see `forward_hidden`."""
        return self.forward_hidden(rows_nD, key_n)[0]

    def forward_hidden(self, rows_nD: Tensor, key_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[n, classes]` and the states before the last layer `[n, H]`.

        rows_nD: features and their means over 1, 2, … hops, side by side. key_n: draws the dropout; None is evaluation.
        """
        parts = zip(self.branches, self.branch_norms, rows_nD.split(self.num_features, dim=1), strict=True)
        x = torch.cat([norm(branch(hop_nF)).relu() for branch, norm, hop_nF in parts], dim=1)
        x = self.norm(self.joined(self._dropped(x, key_n, 0))).relu()
        return self.classes(self._dropped(x, key_n, 1)) / self.temperature, x

    def _dropped(self, x: Tensor, key_n: Tensor | None, layer: int) -> Tensor:
        dropped = keyed_dropout(x, None if key_n is None else derive_keys(key_n, layer), self.dropout)
        assert isinstance(dropped, Tensor)
        return dropped
