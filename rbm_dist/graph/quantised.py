"""Dense features in fewer bytes: float16, or int8 with one scale per column. Readers get float32 back.

Of a value x, in a column whose largest magnitude is m, what is read differs by at most m / 254 (int8: half a step of
m / 127), or |x| / 2^11 and, below 2^-14, 2^-25 (float16: 11 bits of precision); both but for float32's own rounding.
"""

import numpy as np

from rbm_dist.errors import InputError

_STEPS = 127
_FLOAT32, _FLOAT16 = np.finfo(np.float32), np.finfo(np.float16)


def scales(dtype: str, max_F: np.ndarray) -> np.ndarray | None:
    """The scale of each column, `[F]` float32, for int8; None for float16 and float32.

    max_F: the columns' largest magnitudes, `[F]` float32. Raises `InputError` if one is beyond float16.
    """
    if dtype == "int8":
        # Rounded down, or 127 times it could overflow; positive, so that a column of zeros can be divided by it.
        return np.maximum(np.nextafter(max_F / np.float32(_STEPS), np.float32(0)), _FLOAT32.tiny)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            beyond = np.flatnonzero(np.isinf(max_F.astype(np.float16)))
        if len(beyond):
            raise InputError(
                f"partition.features: float16 reaches to ±{_FLOAT16.max:,.0f}, but {len(beyond):,} of the features go "
                f"beyond: the largest magnitude in column {beyond[0]} is {max_F[beyond[0]]:g}. Set partition.features "
                "to float32 or int8, or scale the features"
            )
    return None


def encode(feat_nF: np.ndarray, dtype: str, scale_F: np.ndarray | None) -> np.ndarray:
    """Features as they are stored, `[n, F]` of `dtype`; `scale_F` are their `scales`."""
    return (feat_nF if scale_F is None else np.rint(feat_nF / scale_F)).astype(dtype, copy=False)


def decode(stored_nF: np.ndarray, scale_F: np.ndarray | None) -> np.ndarray:
    """The features that `encode` stored, `[n, F]` float32."""
    return stored_nF.astype(np.float32, copy=False) if scale_F is None else stored_nF * scale_F


def in_reach(feat_nF: np.ndarray, dtype: str, scale_F: np.ndarray | None) -> np.ndarray:
    """Features of nodes that came later, none beyond what the columns of the graph reach: int8 has no more steps.

    Raises `InputError` for what is beyond float16.
    """
    if scale_F is not None:
        return np.clip(feat_nF, -_STEPS * scale_F, _STEPS * scale_F)
    if dtype == "float16" and len(feat_nF):
        scales(dtype, np.abs(feat_nF).max(axis=0))
    return feat_nF
