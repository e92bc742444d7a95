"""Features as they are learned from: what was read, with missing values filled, columns scaled, rows normalised.

Statistics are of the nodes that training sees. They are gathered while a source is staged, and applied when rows go
from there to the parts; what was read is kept as it was until then.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp

from rbm_dist.config.source import SourceSection

_VALUES = 1 << 20  # that are scaled at once
_ROWS: tuple[Literal["", "sum", "length"], ...] = ("", "sum", "length")
_WILD = 100.0  # of features that are mostly zeros, a column of so many times the middle one's magnitude is held back
_APART = 10.0  # how far the columns' spreads may be apart from that of the middle one
SCALING = ("feat_scaling", "feat_indicators")
"""The arrays that a `Scaling` is kept as."""
Rows: TypeAlias = np.ndarray | sp.csr_array


@dataclass(frozen=True)
class Moments:
    """What is known of each column over some rows, `[F]` float64 each. Missing values are counted apart."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray  # Σ (x − mean)²
    low: np.ndarray
    high: np.ndarray
    missing: np.ndarray
    zeros: np.ndarray

    @classmethod
    def of(cls, chunks: Iterable[Rows], num_features: int) -> "Moments":
        """Those of all rows of some chunks."""
        empty = np.zeros(num_features)
        total = cls(empty, empty, empty, empty + np.inf, empty - np.inf, empty, empty)
        for rows in chunks:
            total = total + (cls._sparse(rows) if sp.issparse(rows) else cls._dense(rows))
        return total

    @classmethod
    def _dense(cls, rows_nF: np.ndarray) -> "Moments":
        if not len(rows_nF):
            return cls.of((), rows_nF.shape[1])
        gone_nF = np.isnan(rows_nF)
        missing = np.count_nonzero(gone_nF, axis=0).astype(np.float64)
        zeros = np.count_nonzero(rows_nF == 0, axis=0).astype(np.float64)
        count = len(rows_nF) - missing
        low, high = np.fmin.reduce(rows_nF, axis=0), np.fmax.reduce(rows_nF, axis=0)  # which pass over NaN
        away_nF = rows_nF.astype(np.float64)
        if missing.any():
            away_nF[gone_nF] = 0
        mean = away_nF.sum(axis=0) / np.maximum(count, 1)
        away_nF -= mean
        if missing.any():
            away_nF[gone_nF] = 0
        squares = np.einsum("nf,nf->f", away_nF, away_nF)
        low, high = np.where(count > 0, low, np.inf), np.where(count > 0, high, -np.inf)
        return cls(count, mean, squares, low.astype(np.float64), high.astype(np.float64), missing, zeros)

    @classmethod
    def _sparse(cls, rows: sp.csr_array) -> "Moments":
        count, num_features = rows.shape
        if not count:
            return cls.of((), num_features)
        data, column = rows.data.astype(np.float64), rows.indices
        stored = np.bincount(column, minlength=num_features)
        mean = np.bincount(column, data, num_features) / count
        squares = np.bincount(column, (data - mean[column]) ** 2, num_features) + (count - stored) * mean**2
        low, high = (np.where(stored < count, 0.0, start) for start in (np.inf, -np.inf))
        np.minimum.at(low, column, data)
        np.maximum.at(high, column, data)
        zeros = count - np.bincount(column, data != 0, num_features)
        return cls(np.full(num_features, float(count)), mean, squares, low, high, np.zeros(num_features), zeros)

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both (Chan et al., 1979)."""
        count = self.count + other.count
        some = np.maximum(count, 1)
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / some),
            self.squares + other.squares + apart**2 * (self.count * other.count / some),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.missing + other.missing,
            self.zeros + other.zeros,
        )

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviation of each column; 0 where all values are equal, whatever rounding says."""
        return np.where(self.high > self.low, np.sqrt(self.squares / np.maximum(self.count, 1)), 0.0)

    @property
    def mostly_zeros(self) -> bool:
        """Whether more than half of all values are 0, as those of a bag of words are."""
        return bool(2 * self.zeros.sum() > self.count.sum())

    @property
    def magnitude(self) -> np.ndarray:
        """The root of the mean square of each column."""
        return np.sqrt(self.squares / np.maximum(self.count, 1) + self.mean**2)

    def as_array(self) -> np.ndarray:
        """All of it, `[7, F]`."""
        return np.stack([self.count, self.mean, self.squares, self.low, self.high, self.missing, self.zeros])

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Moments":
        return cls(*array)


@dataclass(frozen=True)
class Scaling:
    """How the features of a row are made of what was read of it, column by column."""

    fill: np.ndarray  # [F] in place of a missing value
    shift: np.ndarray  # [F] is taken away
    factor: np.ndarray  # [F] and what is left multiplied; 0 for a column whose values are all equal
    rows: Literal["", "sum", "length"]  # then a row is divided by the sum of its magnitudes, or by its length
    indicators: np.ndarray  # columns for which a further feature says where a value was missing

    @classmethod
    def of(cls, settings: SourceSection, moments: Moments, sparse: bool) -> "Scaling":
        """The configured one. Sparse features are scaled, but not shifted: they would no longer be sparse."""
        fill = moments.mean if settings.missing == "mean" else np.zeros(len(moments.mean))
        shift, factor = np.zeros(len(fill)), np.ones(len(fill))
        rows: Literal["", "sum", "length"] = ""
        if settings.normalize == "row":
            rows = "sum"
        elif settings.normalize == "auto" and (sparse or moments.mostly_zeros):
            rows, factor = "length", _tamed(moments.magnitude)
        elif settings.normalize != "none":
            spread = moments.magnitude if sparse else moments.deviation
            shift = shift if sparse else moments.mean
            wanted = np.ones(len(fill))
            if settings.normalize == "auto":  # then rows get length 1 in the root mean square
                wanted = in_proportion(spread)
                wanted /= max(float(np.linalg.norm(wanted)), 1.0 / _APART)
            factor = np.divide(wanted, spread, out=np.zeros(len(fill)), where=spread > 0)
        indicators = np.flatnonzero(moments.missing) if settings.missing_indicator else np.empty(0, np.int64)
        return cls(fill, shift, factor, rows, indicators)

    @property
    def num_features(self) -> int:
        return len(self.fill) + len(self.indicators)

    def apply(self, rows: Rows) -> Rows:
        """Features of some rows as they were read, `[n, F]` float32; gives `[n, num_features]` float32."""
        if sp.issparse(rows):
            return self._sparse(rows)
        if self._is_identity and not np.isnan(rows).any():
            return rows
        scaled_nF = np.empty((len(rows), self.num_features), np.float32)
        at_once = max(1, _VALUES // max(1, len(self.fill)))
        for start in range(0, len(rows), at_once):
            block = slice(start, start + at_once)
            scaled_nF[block] = self._dense(rows[block])
        return scaled_nF

    @property
    def _is_identity(self) -> bool:
        return not (self.rows or self.shift.any() or (self.factor != 1).any() or len(self.indicators))

    def _dense(self, rows_nF: np.ndarray) -> np.ndarray:
        gone_nF = np.isnan(rows_nF)
        scaled_nF = rows_nF.astype(np.float64)
        if gone_nF.any():
            scaled_nF = np.where(gone_nF, self.fill, scaled_nF)
        scaled_nF -= self.shift
        scaled_nF *= self.factor
        if self.rows:
            norm_n = np.linalg.norm(scaled_nF, 1 if self.rows == "sum" else 2, axis=1)
            scaled_nF /= np.where(norm_n > 0, norm_n, 1)[:, None]
        if len(self.indicators):
            scaled_nF = np.concatenate([scaled_nF, gone_nF[:, self.indicators]], axis=1)
        return scaled_nF

    def _sparse(self, rows: sp.csr_array) -> sp.csr_array:
        data = rows.data.astype(np.float64) * self.factor[rows.indices]
        if self.rows:
            row = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
            norm_n = np.bincount(row, np.abs(data) if self.rows == "sum" else data**2, rows.shape[0])
            norm_n = norm_n if self.rows == "sum" else np.sqrt(norm_n)
            data /= np.where(norm_n > 0, norm_n, 1)[row]
        return sp.csr_array((data.astype(np.float32), rows.indices, rows.indptr), shape=rows.shape)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """All of it: two arrays, for `from_arrays`."""
        columns = np.stack([self.fill, self.shift, self.factor])
        return dict(zip(SCALING, (columns, np.array([_ROWS.index(self.rows), *self.indicators])), strict=True))

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "Scaling":
        columns, rest = (arrays[name] for name in SCALING)
        rows, *indicators = rest.tolist()
        fill, shift, factor = np.asarray(columns)
        return cls(fill, shift, factor, _ROWS[rows], np.array(indicators, np.int64))


def in_proportion(spread_F: np.ndarray) -> np.ndarray:
    """What each column's spread should become: 1 for the middle one, and others in proportion, between a tenth and ten.

    One of more than ten times the middle one's is in another unit: it becomes 1 too, or it would drown all others. So
    neither a factor that all have in common nor a unit matters, while what matters in counts and in principal
    components still does.
    """
    varies_F = spread_F > 0
    middle = np.median(spread_F[varies_F]) if varies_F.any() else 1.0
    share_F = spread_F / middle
    return np.where(varies_F, np.where(share_F > _APART, 1.0, np.maximum(share_F, 1 / _APART)), 0.0)


def _tamed(magnitude_F: np.ndarray) -> np.ndarray:
    """Factors that leave columns as they are, but for one whose magnitude would decide every row's length."""
    some = magnitude_F[magnitude_F > 0]
    most = _WILD * np.median(some) if len(some) else 1.0
    return np.minimum(1.0, np.divide(most, magnitude_F, out=np.ones(len(magnitude_F)), where=magnitude_F > 0))
