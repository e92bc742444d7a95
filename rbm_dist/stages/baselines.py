"""What needs neither edges nor much time: the accuracies that a teacher has to beat to be worth its cost."""

import warnings

import numpy as np
import scipy.sparse as sp

from rbm_dist.graph.splits import TRAIN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.bits import generator
from rbm_dist.randomness.words import Word
from rbm_dist.sources.scaling import Moments, in_proportion

SAMPLED_ROWS, SAMPLED_VALUES = 20_000, 20_000_000
_ROWS = 4096  # predicted at once, in float64
_ITERATIONS = 50
_INVERSE_PENALTY = 0.1


def majority_class(store: GraphStore) -> int:
    """The most frequent class among the training nodes; of equals the lowest."""
    counts = np.zeros(store.num_classes, np.int64)
    for part in range(store.num_parts):
        counts += np.bincount(store.gather("label", _train(store, part)), minlength=store.num_classes)
    return int(counts.argmax())


class FeatureRegression:
    """Multinomial logistic regression on the features of some training nodes, drawn with the seed.

    At most `SAMPLED_ROWS`, and of dense features no more than have `SAMPLED_VALUES`. Their statistics centre the
    columns, unless these are sparse, and scale them, so that units do not matter. Can be sent to other processes.
    """

    def __init__(self, store: GraphStore, seed: int):
        # Imported here: it takes a second, and only this stage needs it.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        train = np.concatenate([_train(store, part) for part in range(store.num_parts)])
        most = SAMPLED_ROWS if store.sparse_features else min(SAMPLED_ROWS, -(-SAMPLED_VALUES // store.num_features))
        ids = np.sort(generator(seed, Word.REGRESSION_ROWS).permutation(train)[:most])
        label, rows = store.gather("label", ids), _rows(store, ids)
        self._model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_ITERATIONS)
        self._mean_F, self._factor_F = _statistics(rows)
        self._only = label[0] if np.all(label == label[0]) else None  # scikit-learn refuses to fit a single class
        if self._only is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # it predicts well long before
                self._model.fit(self._scaled(rows), label)

    def classes(self, store: GraphStore, ids: np.ndarray) -> np.ndarray:
        """The predicted classes `[n]` of nodes `[n]`."""
        if self._only is not None or not len(ids):
            return np.full(len(ids), self._only)
        pieces = (ids[start : start + _ROWS] for start in range(0, len(ids), _ROWS))
        return np.concatenate([self._model.predict(self._scaled(_rows(store, each))) for each in pieces])

    def _scaled(self, rows: np.ndarray | sp.csr_array) -> np.ndarray | sp.csr_array:
        if isinstance(rows, np.ndarray):
            return (rows - self._mean_F) * self._factor_F
        return sp.csr_array(rows.multiply(self._factor_F))


def _train(store: GraphStore, part: int) -> np.ndarray:
    """The training nodes of a part, which another host may hold."""
    ids = store.ids(part)
    return ids[store.gather("split", ids) == TRAIN]


def _rows(store: GraphStore, ids: np.ndarray) -> np.ndarray | sp.csr_array:
    return store.inputs(ids).astype(np.float64)  # in which the square of no float32 overflows


def _statistics(rows: np.ndarray | sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """What to subtract from each column (of sparse ones: nothing) and what to multiply it by."""
    moments, width = Moments.of([rows], rows.shape[1]), rows.shape[1]
    dense = isinstance(rows, np.ndarray)
    spread_F = moments.deviation if dense else moments.magnitude
    factor_F = np.divide(in_proportion(spread_F), spread_F, out=np.zeros(width), where=spread_F > 0)
    return moments.mean if dense else np.zeros(width), factor_F
