"""Dropout whose mask belongs to a row, not to a rank: the same row gets the same mask wherever it is computed.

A mask bit is a hash of (row key, column). Row keys are 64-bit hashes of (seed, epoch, step, layer, node, expert).
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def derive_keys(key: int | Tensor, word: int | Tensor) -> Tensor:
    """Absorb a word (a node id, a layer, an expert) into 64-bit keys: splitmix64 on int64 tensors, `[B]`."""
    z = torch.as_tensor(_signed(key) if isinstance(key, int) else key) ^ word
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def keyed_dropout(x_BD: Tensor, key_B: Tensor | None, p: float) -> Tensor:
    """Zero each entry with probability `p` and scale the rest by 1 / (1 − p); no key (evaluation) changes nothing."""
    if key_B is None or p == 0:
        return x_BD
    bits = _bits32(key_B, x_BD.shape[1])
    keep = bits >= int(p * 2**32) - 2**31  # bits are uniform over the signed 32-bit integers
    return x_BD * keep * (1 / (1 - p))


def _bits32(key_B: Tensor, width: int) -> Tensor:
    """Uniform int32, `[B, width]`: the 32-bit murmur3 finaliser of (key, column)."""
    column = torch.arange(width, device=key_B.device, dtype=torch.int32) * _signed32(0x9E3779B1)
    high, low = (_shift(key_B, 32)).to(torch.int32), (key_B & _MASK32).to(torch.int32)
    h = high[:, None] ^ column
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        h = h ^ ((h >> shift) & ((1 << (32 - shift)) - 1))
        h = (h + low[:, None]) * _signed32(multiplier)
    return h ^ ((h >> 16) & 0xFFFF)


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _signed32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
