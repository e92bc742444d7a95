"""Where a routing memory starts: the centres of k-means."""

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

_STARTS = 10


def kmeans_centres(rows_BD: np.ndarray | sp.csr_array, num_experts: int, seed: int) -> np.ndarray:
    """k-means centres, `[E, D]`. Fewer distinct rows than experts: the rows there are, again and again."""
    from sklearn.cluster import KMeans  # takes seconds to import, and one rank needs it

    if rows_BD.shape[0] <= num_experts * 100:
        dense_BD = rows_BD if isinstance(rows_BD, np.ndarray) else rows_BD.toarray()
        distinct = np.unique(dense_BD, axis=0)
        if len(distinct) <= num_experts:
            return distinct[np.arange(num_experts) % len(distinct)]
    with threadpool_limits(limits=1):  # several threads add up in the order they come, and runs would differ
        return KMeans(num_experts, n_init=_STARTS, random_state=seed).fit(rows_BD).cluster_centers_
