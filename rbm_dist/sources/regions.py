"""The synthetic graph `regions`, of any size: where a row lies in feature space decides which rule gives its class.

A node's features are its region's centre plus a residual; its class is a linear rule of the residual, and every region
has a rule of its own. One small network must learn all the rules at once; a mixture routed by region learns one per
expert. The features are seen with noise, which a GNN averages away over neighbours of the same class and region.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rbm_dist.config.source import RegionsConfig
from rbm_dist.errors import InputError
from rbm_dist.graph import csc as csc_
from rbm_dist.graph.csc import Csc
from rbm_dist.randomness.bits import generator
from rbm_dist.randomness.words import Word

_CENTRE_NORM = 8.0  # of each centre, where the residual has standard deviation 1 along every feature
_SIZE_EXPONENT = 0.5  # region r has a share of nodes in proportion to (r + 1)^-exponent
_DEGREE_SPREAD = 0.8  # standard deviation of the logarithm of a node's expected degree
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Regions:
    """A generated graph; rows of features are drawn when they are asked for, the same ones each time."""

    config: RegionsConfig
    seed: int
    csc: Csc
    label: np.ndarray  # [N] int64
    region: np.ndarray  # [N] int64

    def feat_chunks(self) -> Iterator[np.ndarray]:
        """The features as observed, `[n, F]` float32 each, rows in order."""
        centres_RF, _ = _centres_and_rules(self.config, self.seed)
        for start in range(0, self.config.num_nodes, _CHUNK_ROWS):
            residual_BF, noise_BF = _residual_and_noise(self.config, self.seed, start)
            centre_BF = centres_RF[self.region[start : start + _CHUNK_ROWS]]
            rows_BF = centre_BF + residual_BF + np.float32(self.config.noise) * noise_BF
            yield rows_BF


def generate(config: RegionsConfig, seed: int) -> Regions:
    """Draw the graph that belongs to a configuration and a seed.

    Raises `InputError` where the nodes are too few for the regions, the classes or the degree.
    """
    if config.num_regions > config.num_nodes:
        raise InputError(f"source.num_regions: {config.num_regions:,} regions for {config.num_nodes:,} nodes")
    if config.degree >= config.num_nodes:
        raise InputError(f"source.degree: {config.degree:,} neighbours, but there are {config.num_nodes:,} nodes")
    share_R = np.arange(1, config.num_regions + 1) ** -_SIZE_EXPONENT
    draw = generator(seed, Word.REGION).random(config.num_nodes)
    region = np.searchsorted(share_R.cumsum() / share_R.sum(), draw, side="right").clip(max=config.num_regions - 1)
    label = _labels(config, seed, region)
    found = len(np.unique(label))
    if config.num_classes == 1 or found < config.num_classes:
        raise InputError(
            f"source.num_classes: {config.num_classes:,} classes, of which {found:,} occur among {config.num_nodes:,} "
            "nodes; at least two must, and all of them: change num_classes, or raise num_nodes or num_features"
        )
    src, dst = _edges(config, seed, region * config.num_classes + label)
    return Regions(config, seed, csc_.build(src, dst, config.num_nodes, undirected=True), label, region)


def _centres_and_rules(config: RegionsConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres `[R, F]` and rules `[R, F, C]`, float32: random directions, so that regions differ by cosine."""
    rng = generator(seed, Word.REGION_RULES)
    centres_RF = rng.standard_normal((config.num_regions, config.num_features))
    rules_RFC = rng.standard_normal((config.num_regions, config.num_features, config.num_classes))
    centres_RF *= _CENTRE_NORM / np.linalg.norm(centres_RF, axis=1, keepdims=True)
    rules_RFC /= np.linalg.norm(rules_RFC, axis=1, keepdims=True)  # no class is favoured
    return centres_RF.astype(np.float32), rules_RFC.astype(np.float32)


def _residual_and_noise(config: RegionsConfig, seed: int, start: int) -> np.ndarray:
    """Two draws `[2, n, F]` for the chunk of rows from `start`: what the rule sees, and what hides it."""
    rows = min(_CHUNK_ROWS, config.num_nodes - start)
    return generator(seed, Word.REGION_ROWS, start).standard_normal((2, rows, config.num_features), dtype=np.float32)


def _labels(config: RegionsConfig, seed: int, region: np.ndarray) -> np.ndarray:
    _, rules_RFC = _centres_and_rules(config, seed)
    label = np.empty(config.num_nodes, np.int64)
    for start in range(0, config.num_nodes, _CHUNK_ROWS):
        residual_BF, _ = _residual_and_noise(config, seed, start)
        region_B, label_B = region[start : start + _CHUNK_ROWS], label[start : start + _CHUNK_ROWS]
        for r in np.unique(region_B):
            label_B[region_B == r] = (residual_BF[region_B == r] @ rules_RFC[r]).argmax(axis=1)
    return label


def _edges(config: RegionsConfig, seed: int, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of `N · degree / 2` undirected edges, each end drawn in proportion to a lognormal weight per node."""
    rng = generator(seed, Word.REGION_EDGES)
    num_edges = config.num_nodes * config.degree // 2
    by_group = np.argsort(group, kind="stable").astype(csc_.id_dtype(config.num_nodes))
    ends = np.cumsum(np.bincount(group))
    # Position p of `by_group` owns the interval [before[p], before[p + 1]) of the line of weights.
    before = np.zeros(config.num_nodes + 1)
    np.cumsum(rng.lognormal(sigma=_DEGREE_SPREAD, size=config.num_nodes), out=before[1:])

    def pick(low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
        at = np.searchsorted(before, low + (high - low) * rng.random(num_edges), side="right") - 1
        return by_group[at.clip(max=config.num_nodes - 1)]

    src = pick(0.0, before[-1])
    alike = rng.random(num_edges) < config.homophily
    last = ends[group[src]]
    first = np.concatenate([[0], ends])[group[src]]
    dst = pick(np.where(alike, before[first], 0.0), np.where(alike, before[last], before[-1]))
    return src, dst
