"""Class distributions in fewer bytes: float16, or the likeliest classes alone. Readers get float32 back.

Of the m likeliest a row has their probabilities, best first, as the bits of float16, and then their numbers, both in 16
bits (`uint16 [n, 2 m]`); what is left of one is spread evenly over the other classes. A row of zeros stays one. What
else is known of the teacher, hidden states say, is float16 beside either.
"""

import numpy as np


def layout(store: str, top_m: int, num_classes: int) -> tuple[np.dtype, int]:
    """Type and columns of stored rows; `store`: float32, float16 or top_m."""
    if store == "top_m":
        return np.dtype(np.uint16), 2 * min(top_m, num_classes)
    return np.dtype(store), num_classes


def dtype_beside(store: str) -> np.dtype:
    """Type of what else is stored of the teacher."""
    return np.dtype(np.float32 if store == "float32" else np.float16)


def encode_beside(rows: np.ndarray, store: str) -> np.ndarray:
    """Such rows as they are stored; float16 ends at ±65,504, and what is beyond becomes that."""
    most = np.finfo(np.float16).max
    return rows if store == "float32" else rows.clip(-most, most).astype(np.float16)


def encode(soft_nC: np.ndarray, store: str, top_m: int) -> np.ndarray:
    """Probabilities `[n, C]` as they are stored, see `layout`."""
    if store != "top_m":
        return soft_nC.astype(store, copy=False)
    m = min(top_m, soft_nC.shape[1])
    class_nm = np.argsort(-soft_nC, axis=1, kind="stable")[:, :m]
    top_nm = np.take_along_axis(soft_nC, class_nm, axis=1).astype(np.float16)
    return np.concatenate([top_nm.view(np.uint16), class_nm.astype(np.uint16)], axis=1)


def decode(stored: np.ndarray, num_classes: int) -> np.ndarray:
    """The probabilities that `encode` stored, `[n, C]` float32."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32, copy=False)
    m = stored.shape[1] // 2
    top_nm = np.ascontiguousarray(stored[:, :m]).view(np.float16).astype(np.float32)
    rest_n = np.maximum(1 - top_nm.sum(axis=1), 0) / max(num_classes - m, 1)
    soft_nC = np.repeat(np.where(top_nm[:, 0] > 0, rest_n, 0)[:, None], num_classes, axis=1).astype(np.float32)
    np.put_along_axis(soft_nC, stored[:, m:].astype(np.int64), top_nm, axis=1)
    return soft_nC
