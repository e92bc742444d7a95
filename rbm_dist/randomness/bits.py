"""Counter-based random bits: a value depends on its key alone, never on order, threads or ranks.

splitmix64 (Steele, Lea & Flood, 2014) over the words of a key; the same function for numpy scalars and in Numba.
"""

import numpy as np
from numba import njit, uint64

GAMMA, MULTIPLIERS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
_GAMMA, _M1, _M2 = np.uint64(GAMMA), np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


@njit(uint64(uint64, uint64), inline="always", cache=True)
def mix(state: np.uint64, word: np.uint64) -> np.uint64:
    """Absorb one 64-bit word into a 64-bit state."""
    z = (state ^ word) + _GAMMA
    z = (z ^ (z >> _30)) * _M1
    z = (z ^ (z >> _27)) * _M2
    return z ^ (z >> _31)


def key(*words: int) -> int:
    """A 64-bit key of some non-negative integers, such as (seed, epoch, step)."""
    state = np.uint64(0)
    for word in words:
        state = np.uint64(mix(state, np.uint64(word)))
    return int(state)


def generator(*words: int) -> np.random.Generator:
    """A numpy generator that belongs to a key, such as (seed, epoch, part)."""
    return np.random.Generator(np.random.Philox(key=key(*words)))
