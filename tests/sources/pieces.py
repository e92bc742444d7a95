"""All of a streamed source at once."""

import numpy as np

from rbm_dist.sources.streamed import StreamedSource


def read_edges(source: StreamedSource) -> np.ndarray:
    """`[2, M]`, through every piece."""
    chunks = [np.stack(chunk) for piece in range(source.num_edge_pieces) for chunk in source.edges(piece)]
    return np.concatenate(chunks, axis=1)


def read_features(source: StreamedSource) -> np.ndarray:
    """`[N, F]`; each piece has the rows that are announced."""
    found = []
    for piece, size in enumerate(np.diff(source.feat_offsets)):
        chunks = list(source.feat(piece))
        assert sum(map(len, chunks)) == size
        found += chunks
    return np.concatenate(found)
