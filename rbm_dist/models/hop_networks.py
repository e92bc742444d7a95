"""Teachers without sampling: networks on features averaged over more and more hops, SGC, SIGN and SAGN.

Each is given rows of features and their means over 1, 2, … hops, side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.models.norm import make_norm
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.randomness.rows import derive_keys


class HopNetwork(nn.Module):
    """Logits of rows over hops."""

    temperature: Tensor  # of the logits; set by calibration

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, rows_nD: Tensor, key_n: Tensor | None = None) -> Tensor:
        """Logits `[n, classes]`; see `forward_hidden`."""
        return self.forward_hidden(rows_nD, key_n)[0]

    def forward_hidden(self, rows_nD: Tensor, key_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[n, classes]` and the states before the last layer. key_n: draws the dropout; None is evaluation."""
        raise NotImplementedError


class Sgc(HopNetwork):
    """A linear map of the features averaged over all hops (Wu et al., 2019)."""

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.num_features, self.classes = num_features, nn.Linear(num_features, num_classes)

    def forward_hidden(self, rows_nD: Tensor, key_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = rows_nD[:, -self.num_features :]
        return self.classes(x) / self.temperature, x


class _Branched(HopNetwork):
    """A linear map, norm and ReLU per hop; these joined, a hidden layer, the classes; dropout before either."""

    def __init__(
        self, num_features: int, hidden: int, num_classes: int, hops: int, dropout: float, norm: str, joined: int
    ):  # fmt: skip
        super().__init__()
        self.num_features, self.dropout = num_features, dropout
        self.branches = nn.ModuleList(nn.Linear(num_features, hidden) for _ in range(hops + 1))
        self.branch_norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(hops + 1))
        self.joined, self.norm = nn.Linear(joined, hidden), make_norm(norm, hidden)
        self.classes = nn.Linear(hidden, num_classes)

    def forward_hidden(self, rows_nD: Tensor, key_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = zip(self.branches, self.branch_norms, rows_nD.split(self.num_features, dim=1), strict=True)
        x = self._join([norm(branch(hop_nF)).relu() for branch, norm, hop_nF in parts], rows_nD)
        x = self.norm(self.joined(self._dropped(x, key_n, 0))).relu()
        return self.classes(self._dropped(x, key_n, 1)) / self.temperature, x

    def _join(self, hops_nH: list[Tensor], rows_nD: Tensor) -> Tensor:
        raise NotImplementedError

    def _dropped(self, x: Tensor, key_n: Tensor | None, layer: int) -> Tensor:
        dropped = keyed_dropout(x, None if key_n is None else derive_keys(key_n, layer), self.dropout)
        assert isinstance(dropped, Tensor)
        return dropped


class Sign(_Branched):
    """Hops side by side (Frasca et al., 2020)."""

    def __init__(self, num_features: int, hidden: int, num_classes: int, hops: int, dropout: float, norm: str = "none"):
        super().__init__(num_features, hidden, num_classes, hops, dropout, norm, joined=hidden * (hops + 1))

    def _join(self, hops_nH: list[Tensor], rows_nD: Tensor) -> Tensor:
        return torch.cat(hops_nH, dim=1)


class Sagn(_Branched):
    """Each node weighs its hops by attention, and adds a linear map of its own features (Sun et al., 2021; one head).

    The weight of hop k is the softmax over hops of `LeakyReLU(a · [H_0, H_k])`.
    """

    def __init__(self, num_features: int, hidden: int, num_classes: int, hops: int, dropout: float, norm: str = "none"):
        super().__init__(num_features, hidden, num_classes, hops, dropout, norm, joined=hidden)
        self.attention = nn.Linear(2 * hidden, 1, bias=False)
        self.residual = nn.Linear(num_features, hidden, bias=False)

    def _join(self, hops_nH: list[Tensor], rows_nD: Tensor) -> Tensor:
        scores_nK = torch.cat([self.attention(torch.cat([hops_nH[0], hop_nH], dim=1)) for hop_nH in hops_nH], dim=1)
        weights_nK1 = F.leaky_relu(scores_nK, 0.2).softmax(1).unsqueeze(2)
        weighed_nH = (weights_nK1 * torch.stack(hops_nH, dim=1)).sum(1)
        return weighed_nH + self.residual(rows_nD[:, : self.num_features])
