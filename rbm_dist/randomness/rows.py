"""Masks and noise that belong to a row, not to a rank: the same row gets the same wherever it is computed.

A bit is a hash of (row key, column). Row keys are 64-bit hashes of (seed, epoch, step, layer, node, expert).
"""

import math

import numpy as np
import torch
from numba import float32, float64, int32, int64, njit, vectorize
from torch import Tensor

from rbm_dist.randomness.bits import GAMMA, MULTIPLIERS

_MASK32 = 0xFFFFFFFF


def derive_keys(key: int | Tensor, word: int | Tensor) -> Tensor:
    """Absorb a word (a node id, a layer, an expert) into 64-bit keys: splitmix64 on int64 tensors, `[B]`."""
    z = torch.as_tensor(_signed(key) if isinstance(key, int) else key) ^ word
    z = z + _signed(GAMMA)
    z = (z ^ _shift(z, 30)) * _signed(MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * _signed(MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def keyed_normal(key_B: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Standard normal noise `[B, width]` (Box & Muller, 1958)."""
    radius, angle = (keyed_uniform(derive_keys(key_B, word), width, dtype) for word in (1, 2))
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def keyed_uniform(key_B: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Uniform noise `[B, width]`, above 0 and up to 1."""
    column = torch.arange(width, device=key_B.device)
    return (_bits32(key_B[:, None], column).to(dtype) + 2**31 + 1) / 2**32


def dropout_mask(key: Tensor, column: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """0 with probability p, else 1 / (1 − p), of (key, column), broadcast over each other."""
    if key.device.type == "cpu" and dtype in (torch.float32, torch.float64):  # one pass instead of a dozen
        scale = np.array(1 / (1 - p), np.float32 if dtype == torch.float32 else np.float64)
        return torch.from_numpy(_mask_numba(key.numpy(), column.numpy(), np.int32(threshold_of(p)), scale))
    return (_bits32(key, column) >= threshold_of(p)).to(dtype) * (1 / (1 - p))


def threshold_of(p: float) -> int:
    """Bits below this are dropped with probability p: they are uniform over the signed 32-bit integers."""
    return int(p * 2**32) - 2**31


def _bits32(key: Tensor, column: Tensor) -> Tensor:
    """Uniform int32: the 32-bit murmur3 finaliser of (key, column), broadcast over each other."""
    high, low = (_shift(key, 32)).to(torch.int32), (key & _MASK32).to(torch.int32)
    h = high ^ (column.to(torch.int32) * _signed32(0x9E3779B1))
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        h = h ^ ((h >> shift) & ((1 << (32 - shift)) - 1))
        h = (h + low) * _signed32(multiplier)
    return h ^ ((h >> 16) & 0xFFFF)


@njit(int32(int64, int64), inline="always", cache=True)
def bits32(key, column):  # type: ignore[no-untyped-def]
    """As `_bits32`, of one key and column, in Numba."""
    high, low = np.uint32(np.uint64(key) >> np.uint64(32)), np.uint32(key)
    h = high ^ np.uint32(np.uint32(column) * np.uint32(0x9E3779B1))
    h = h ^ (h >> np.uint32(16))
    h = np.uint32(np.uint32(h + low) * np.uint32(0x85EBCA6B))
    h = h ^ (h >> np.uint32(13))
    h = np.uint32(np.uint32(h + low) * np.uint32(0xC2B2AE35))
    return np.int32(h ^ (h >> np.uint32(16)))


@vectorize([float32(int64, int64, int32, float32), float64(int64, int64, int32, float64)], cache=True)
def _mask_numba(key, column, threshold, scale):  # type: ignore[no-untyped-def]
    """`_bits32` and the comparison, element by element."""
    return scale if bits32(key, column) >= threshold else scale * 0


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _signed32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
