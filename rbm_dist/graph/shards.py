"""The on-disk layout: one folder per part, nodes renumbered so that a part owns one contiguous id range.

    graph.json                 version, counts, dtypes, part offsets, checksums; written last
    part-00003/indptr.npy      CSC: in-edges of the part's own nodes
               indices.npy     ids of the sources
               feat.npy label.npy split.npy orig_id.npy

Sparse features are four arrays in place of `feat`: feat_indptr, feat_indices, feat_values, feat_shape, a CSR matrix.
How they came from what was read is in feat_scaling.npy and feat_indicators.npy (`sources/scaling.py`).
Dense ones may be stored as float16, or as int8 with `feat_scale.npy` beside graph.json (`quantised.py`).
Laid end to end, the parts are the whole graph's CSC. Plain `.npy`, see docs/on-disk-format.md.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from rbm_dist.graph.csc import id_dtype

VERSION = 2
QUANTISED = 3
"""The version of a graph whose features are not stored as float32: who knows version 2 only would misread them."""
FEAT_SCALE = "feat_scale.npy"
SPARSE_FEAT = ("feat_indptr", "feat_indices", "feat_values", "feat_shape")
PER_ROW = ("label", "split", "orig_id")
"""Arrays that every graph has, of one entry per node."""
ORIG_NAME = "orig_name"
"""The caller's ids as bytes, where they are text or binary; `orig_id` is then the row in the caller's node table."""


@dataclass(frozen=True)
class IdType:
    """What ids are: how they are compared, and the type in which they came and go back."""

    kind: Literal["integer", "unsigned", "text", "bytes"]
    arrow: str  # Arrow's name of the type, see `sources/node_ids.py`

    @property
    def is_named(self) -> bool:
        """Whether ids are kept as bytes."""
        return self.kind in ("text", "bytes")

    def __str__(self) -> str:
        return {"text": "text", "bytes": "binary"}.get(self.kind, "integers")


ROW_NUMBERS = IdType("integer", "int64")


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def sparse_arrays(feat: sp.csr_array) -> dict[str, np.ndarray]:
    """The arrays of sparse features. Both index arrays have one dtype, so that scipy maps them without a copy."""
    dtype = id_dtype(max(feat.nnz, *feat.shape))
    indptr, indices = feat.indptr.astype(dtype), feat.indices.astype(dtype)
    arrays = (indptr, indices, feat.data.astype(np.float32), np.array(feat.shape, np.int64))
    return dict(zip(SPARSE_FEAT, arrays, strict=True))


def sparse_matrix(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: np.ndarray) -> sp.csr_array:
    """The CSR matrix `[rows, features]` over such arrays, memory-mapped if they are."""
    return sp.csr_array((values, indices, indptr), shape=tuple(shape.tolist()), copy=False)
