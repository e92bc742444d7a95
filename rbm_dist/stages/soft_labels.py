"""Stage `soft_labels`: the teacher's class distribution for every node, by actors that each work on their own parts.

`sampled`: mini-batches with sampled neighbours. `exact`: layer by layer over all in-neighbours; each layer's states are
an array of the store, so memory is bounded by a few batches whatever the depth. The store averages the in-neighbours,
a bounded number of them at a time, whatever a node's degree; sparse features, ones with noise, and rows for layers
that do not average, are gathered for batches of few edges. Either way the store is read in a thread that works ahead.
Of a teacher from elsewhere its predictions are brought into the order of the parts. Where the graph is a new version of
another, and the teacher the same, only rows that can differ are computed (`Before`).
"""

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.config.teacher import GCN, MEAN
from rbm_dist.graph.feature_hops import ARRAYS as HOPS
from rbm_dist.graph.feature_hops import reads_hops
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.propagate import mean_of_neighbours
from rbm_dist.graph.reach import LEARN, TOUCHED, is_touched, touched_nodes
from rbm_dist.graph.shards import part_name
from rbm_dist.graph.smooth import ARRAYS as SMOOTHING
from rbm_dist.graph.smooth import UNSMOOTHED, smooths
from rbm_dist.graph.soft_rows import dtype_beside, encode, encode_beside, layout
from rbm_dist.graph.store import SOFT, GraphStore
from rbm_dist.graph.version import link, replaced
from rbm_dist.models.gnn import Gnn
from rbm_dist.models.hop_networks import HopNetwork
from rbm_dist.models.teacher import build_teacher
from rbm_dist.moe.sparse_rows import dense
from rbm_dist.randomness.bits import generator, key
from rbm_dist.randomness.words import Word
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.shard_servers import ShardServers, open_graph, shard_servers
from rbm_dist.runtime.tasks import run_on_parts
from rbm_dist.serve.artifact import load_weights
from rbm_dist.stages.encodings import over_tasks
from rbm_dist.stages.external_teacher import open_external
from rbm_dist.stages.feature_hops import add_feature_hops
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.smooth import FIGURES, RunStep, smooth_soft_labels
from rbm_dist.train.external_teacher import TAUGHT, leaves_out
from rbm_dist.train.hop_rows import hop_states, read_hops
from rbm_dist.train.sampled_rows import SampledRows, add_noise, keep_hot, read_sample, states

HIDDEN, ENTROPY_CHANGE, NOISY_SOFT = "hidden", "entropy_change", "noisy_soft"
ARRAYS = rf"{SOFT}|{TAUGHT}|{HIDDEN}|{ENTROPY_CHANGE}|{NOISY_SOFT}|{TOUCHED}|{LEARN}|h\d+|noisy\d+|{SMOOTHING}"
"""A regular expression of the names of all arrays that the stage makes, on the way too."""
_ROWS, _BYTES = 16_384, 1 << 25  # nodes that are read at a time where each is one row, and bytes of these, at most
GATHERED_EDGES = 1 << 18  # in-edges whose sources' rows are gathered at a time


def rows_at_a_time(width: int) -> int:
    """Nodes that are read at a time, of so many float32 each, where no neighbourhood is gathered."""
    return max(1, min(_ROWS, _BYTES // (4 * width)))


MakeWorker = Callable[[], Callable[[int], Any]]
OverParts = Callable[[Run, MakeWorker, list[int]], list[Any]]
"""Calls a worker on each of some parts; results in their order."""


@dataclass(frozen=True)
class Before:
    """The version of the graph of which all rows are kept that cannot differ; the array TOUCHED says which can."""

    graph_url: str
    layer: int = 0  # after which these rows are states
    nodes: int = 0  # whose states then can differ


def run_soft_labels(run: Run, before: Before | None = None) -> Files:
    """Write the array `soft` (`[N, C]`, see `soft_rows`); if configured, `entropy_change` `[N]`, `hidden` `[N, H]`."""
    if reads_hops(run.config):  # another start may have removed them
        add_feature_hops(run, "soft_labels")
    with shard_servers(run.config.cluster, run.graph_url) as servers:
        num_parts = GraphStore.open(run.graph_url).num_parts
        over = functools.partial(over_tasks, run, "soft_labels", num_parts, servers)
        return write_soft_labels(run, _by_actors, servers, over, before)


def write_soft_labels(
    run: Run, over_parts: OverParts, servers: ShardServers | None = None, run_step: RunStep | None = None,
    before: Before | None = None,
) -> Files:  # fmt: skip
    """The stage's work, wherever `over_parts` carries it out, and `run_step` the steps of smoothing (default: here)."""
    settings, layers = run.config.soft_labels, len(run.config.teacher.fanout)
    store = GraphStore.open(run.graph_url)
    external, hops = run.config.teacher.external, reads_hops(run.config)
    wanted = [SOFT, *[HIDDEN] * settings.hidden, *[ENTROPY_CHANGE] * settings.entropy_change]
    wanted += [TAUGHT] * leaves_out(external)
    teacher = run.config.teacher
    widest, joined = max(store.num_features, teacher.hidden), (teacher.hops + 1) * store.num_features
    said = UNSMOOTHED if smooths(settings) else SOFT  # what the teacher says
    jumps = teacher.jumping_knowledge != "none"
    clean, noisy = layer_names(run.config)
    passing = [*clean, *noisy, NOISY_SOFT]
    if settings.keep_layers:
        wanted += kept_layers(run.config)

    def fill(
        name: str, read: Read, batch: int = settings.batch_size, edges: int | None = None, layer: int = layers
    ) -> None:  # fmt: skip
        since = None if before is None else replace(before, layer=layer, nodes=touched_nodes(store, layer))
        _fill(run, store, name, read, batch, edges, over_parts, servers, since)

    def layer_by_layer(hidden: list[str], last: str, noise: bool) -> None:
        for layer, (under, name) in enumerate(pairwise(["feat", *hidden, *[last] * (not jumps)])):
            if run.config.teacher.conv != MEAN or (layer == 0 and (noise or store.sparse_features)):
                gathered = functools.partial(_exact_gathered, layer=layer, before=under, noise=noise and layer == 0)
                fill(name, gathered, edges=GATHERED_EDGES, layer=layer + 1)
            else:
                averaged = functools.partial(_exact_layer, layer=layer, before=under)
                fill(name, averaged, rows_at_a_time(widest), layer=layer + 1)
        if jumps:
            fill(last, functools.partial(_jumped, names=hidden), rows_at_a_time(layers * teacher.hidden))

    if not all(storage.exists(run.path("graph", f"{name}.json")) for name in wanted):
        exact = settings.inference == "exact"
        if external is not None:
            fill(said, _external, rows_at_a_time(store.num_classes))
            if leaves_out(external):
                fill(TAUGHT, _taught, _ROWS)
        elif hops:
            fill(said, functools.partial(_of_hops, state=0), rows_at_a_time(joined))
        elif exact:
            layer_by_layer(clean, said, noise=False)
        else:
            fill(said, _sampled)
        if settings.hidden and hops:
            fill(HIDDEN, functools.partial(_of_hops, state=1), rows_at_a_time(joined))
        elif settings.hidden:
            fill(HIDDEN, functools.partial(_copy, name=clean[-1]) if exact else _sampled_hidden)
        if settings.entropy_change:
            if exact:
                layer_by_layer(noisy, NOISY_SOFT, noise=True)
            fill(ENTROPY_CHANGE, functools.partial(_entropy_change, noisy=NOISY_SOFT if exact else None))
        if smooths(settings):
            smooth_soft_labels(run, over_parts, run_step, servers)
    for name in set(passing).difference(wanted):
        store.remove(name)
    if hops:
        store.remove_matching(HOPS)
    if smooths(settings):
        store.remove_matching(SMOOTHING)
    indexes = [storage.read_json(run.path("graph", f"{name}.json")) for name in wanted]
    files = {f"graph/{name}": info for index in indexes for name, info in index["files"].items()}
    if smooths(settings):
        files[f"soft_labels/{FIGURES}"] = storage.file_info(run.path("soft_labels", FIGURES))
    return files


def layer_names(config: Config) -> tuple[list[str], list[str]]:
    """The states between the teacher's layers, as exact inference names them; the same of noisy features."""
    exact = config.soft_labels.inference == "exact" and config.teacher.is_gnn
    jumps = config.teacher.jumping_knowledge != "none"
    layers = range(1, len(config.teacher.fanout) + jumps) if exact else ()
    return [f"h{layer}" for layer in layers], [f"noisy{layer}" for layer in layers]


def kept_layers(config: Config) -> list[str]:
    """The arrays that exact inference of a changed graph needs of the graph before."""
    clean, noisy = layer_names(config)
    return clean + [*noisy, NOISY_SOFT] * config.soft_labels.entropy_change


def reset_soft_labels(url: str) -> None:
    """Remove the arrays that this stage added to the graph."""
    graph = storage.join(url, "graph")
    if storage.exists(storage.join(graph, "graph.json")):
        GraphStore.open(graph).remove_matching(ARRAYS)


Compute = Callable[[Any], torch.Tensor]
Read = Callable[[Config, GraphStore, np.ndarray, torch.device], Compute]
"""Takes what some nodes' rows depend on out of the store; what it gives computes them with the teacher."""


def _fill(
    run: Run, store: GraphStore, name: str, read: Read, batch: int, edges: int | None, over_parts: OverParts,
    servers: ShardServers | None, before: Before | None,
) -> None:  # fmt: skip
    """Fill a new array in all parts; parts that a cut-off run finished are kept.

    batch: nodes at a time; their in-edges are at most `edges`, but for a node that has more alone. before: where rows
    that cannot differ are; None: all are computed.
    """
    if storage.exists(run.path("graph", f"{name}.json")):
        return
    make_worker = functools.partial(
        _make_worker, run.config, run.graph_url, run.path("teacher"), name, read, batch, edges, run.reporter, servers,
        before,
    )  # fmt: skip
    store.publish(name, over_parts(run, make_worker, list(range(store.num_parts))))


def _by_actors(run: Run, make_worker: MakeWorker, parts: list[int]) -> list[storage.FileInfo]:
    return run_on_parts("soft_labels", make_worker, parts, run.config.cluster)


def _make_worker(
    config: Config, graph_url: str, teacher_url: str, name: str, read: Read, batch: int, edges: int | None,
    reporter: Reporter, servers: ShardServers | None, before: Before | None,
) -> Callable[[int], storage.FileInfo]:  # fmt: skip
    """Runs in an actor: opens the graph and the teacher once, then fills one part per call."""
    torch.set_num_threads(1)
    settings = config.soft_labels
    store = open_graph(graph_url, config.teacher.sampler, servers)
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    model: Any
    if config.teacher.external is not None:
        model = open_external(config, store, teacher_url)
    else:
        model = build_teacher(config, store.num_features, store.num_classes)
        load_weights(storage.join(teacher_url, "model.safetensors"), model)
        model.eval().to(device)

    def chunks(part: int, every: np.ndarray) -> Generator[np.ndarray, None, None]:
        in_batches = _batches(store, part, every, batch, edges)
        jobs = (functools.partial(read, config, store, ids, device) for ids in in_batches)
        with Prefetch(f"soft labels: '{name}' of part {part}", jobs, config.cluster.collective_timeout_s) as batches:
            for compute in batches:
                with torch.no_grad():
                    rows = compute(model).cpu().numpy()
                if name == SOFT:
                    rows = encode(rows, settings.store, settings.top_m)
                yield encode_beside(rows, settings.store) if name in (HIDDEN, ENTROPY_CHANGE) else rows
                total = store.num_nodes if before is None else before.nodes
                reporter.add(f"soft labels: {name}", len(rows), total, "nodes")

    def fill(part: int) -> storage.FileInfo:
        url = storage.join(graph_url, part_name(part), f"{name}.npy")
        if storage.exists(url):  # files appear whole, and only this stage with this configuration writes them
            return storage.file_info(url)
        store.hold([part])
        if store.hot is None and read in (_sampled, _sampled_hidden):  # the first part says what all need
            rng = generator(config.seed, Word.SOFT_LABEL_HOT_ROWS, part)
            ids = rng.permutation(store.ids(part))
            steps = [[ids[start : start + batch]] for start in range(0, len(ids), batch)]
            keep_hot(store, config, steps, config.soft_labels.fanout or config.teacher.fanout)
        dtype, width = layout(settings.store, settings.top_m, store.num_classes)
        classes = (store.num_classes,)
        shapes = {SOFT: (width,), UNSMOOTHED: classes, NOISY_SOFT: classes, ENTROPY_CHANGE: (), TAUGHT: ()}
        dtypes = {SOFT: dtype} | dict.fromkeys((HIDDEN, ENTROPY_CHANGE), dtype_beside(settings.store))
        dtype, shape = dtypes.get(name, np.dtype(np.float32)), shapes.get(name, (config.teacher.hidden,))
        ids, old = store.ids(part), np.empty((0, *shape), dtype)
        if before is not None:
            ids = ids[is_touched(store, part, before.layer)]
            known = GraphStore.open(before.graph_url)
            if part < known.num_parts:
                old = known.array(name, part)
                if not len(ids):
                    return link(known, f"{part_name(part)}/{name}.npy", graph_url)
        with closing(chunks(part, ids)) as rows:  # a disk that is full, say, leaves no thread behind
            made = rows if before is None else replaced(old, ids - store.offsets[part], rows, len(store.ids(part)))
            return store.write_part(name, part, dtype, shape, made)

    return fill


def _batches(store: GraphStore, part: int, ids: np.ndarray, batch: int, edges: int | None) -> Iterator[np.ndarray]:
    """Nodes of a part, so many at a time, with so many in-edges at most."""
    at, start = ids - store.offsets[part], 0
    indptr = store.array("indptr", part)
    ends = None if edges is None else np.cumsum(indptr[at + 1] - indptr[at])
    while start < len(ids):
        stop = start + batch
        if ends is not None and edges is not None:
            most = edges + (int(ends[start - 1]) if start else 0)
            stop = min(stop, max(start + 1, int(np.searchsorted(ends, most, side="right"))))
        yield ids[start:stop]
        start = stop


def _sampled(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device) -> Compute:
    passes = _read_passes(config, store, ids, device)
    return lambda model: _mean_of(model, passes)


def _read_passes(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device) -> list[SampledRows]:
    return [_read_sampled(config, store, ids, device, number) for number in range(config.soft_labels.passes)]


def _mean_of(model: Gnn, passes: list[SampledRows], noise_key: int | None = None) -> torch.Tensor:
    """The class distributions of all samples, averaged."""
    return torch.stack([states(model, each, noise_key=noise_key)[0].softmax(1) for each in passes]).mean(0)


def _sampled_hidden(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device) -> Compute:
    sampled = _read_sampled(config, store, ids, device)
    return lambda model: dense(states(model, sampled)[1])


def _read_sampled(
    config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, number: int = 0
) -> SampledRows:  # fmt: skip
    fanout = config.soft_labels.fanout or config.teacher.fanout
    sample_key = key(config.seed, Word.SOFT_LABELS, *[number] * (number > 0))
    return read_sample(store, ids, fanout, sample_key, device, degrees=config.teacher.conv == GCN)


def _entropy_change(
    config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, noisy: str | None
) -> Compute:
    """How far unit Gaussian noise on all features moves the entropy of a node's soft labels (Wu et al., 2023)."""
    soft_nC = torch.from_numpy(store.gather(SOFT, ids))
    if noisy is not None:
        noisy_nC = torch.from_numpy(store.gather(noisy, ids))
        return lambda model: (_entropy(noisy_nC) - _entropy(soft_nC)).abs()
    passes, noise_key = _read_passes(config, store, ids, device), key(config.seed, Word.SOFT_LABEL_NOISE)

    def compute(model: Gnn) -> torch.Tensor:
        noisy_nC = _mean_of(model, passes, noise_key).cpu()
        return (_entropy(noisy_nC) - _entropy(soft_nC)).abs()

    return compute


def _entropy(probability_nC: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(probability_nC.double()).sum(1).float()


def _copy(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, name: str) -> Compute:
    rows = torch.from_numpy(store.gather(name, ids))
    return lambda model: rows


def _exact_layer(
    config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, layer: int, before: str
) -> Compute:
    mean_nD, own_nD = (
        torch.from_numpy(rows) for rows in (mean_of_neighbours(store, before, ids), store.gather(before, ids))
    )

    def compute(model: Gnn) -> torch.Tensor:
        return _states_or_soft(model, layer, model.layer_of_means(layer, own_nD.to(device), mean_nD.to(device)))

    return compute


def _exact_gathered(
    config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, layer: int, before: str, noise: bool
) -> Compute:
    """A layer of all in-neighbours' rows, each for itself."""
    sampled = read_sample(store, ids, (-1,), key(0), device, (before,), config.teacher.conv == GCN)

    def compute(model: Gnn) -> torch.Tensor:
        rows_nD, neighbourhood = sampled.to(device)
        if noise:
            rows_nD = add_noise(rows_nD, sampled.neighbourhood.node_n.numpy(), key(config.seed, Word.SOFT_LABEL_NOISE))
        return _states_or_soft(
            model, layer, model.layer(layer, rows_nD, len(ids), neighbourhood.edge_2m, neighbourhood.degree_n)
        )

    return compute


def _states_or_soft(model: Gnn, layer: int, out_nO: torch.Tensor) -> torch.Tensor:
    return out_nO.softmax(1) if layer == model.num_inner else out_nO


def _jumped(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, names: list[str]) -> Compute:
    """The class distributions of a teacher with jumping knowledge, from the states after all layers."""
    states = [torch.from_numpy(store.gather(name, ids)) for name in names]
    return lambda model: model.jumped([each.to(device) for each in states]).softmax(1)


def _external(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device) -> Compute:
    return lambda teacher: torch.from_numpy(teacher.probabilities(ids))


def _of_hops(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device, state: int) -> Compute:
    """The class distributions (state 0) or the hidden states (1) of a hop-precomputed teacher."""
    batch = read_hops(store, ids, config.teacher.hops, 0, device)

    def compute(model: HopNetwork) -> torch.Tensor:
        found = hop_states(model, batch)[state]
        return found if state else found.softmax(1)

    return compute


def _taught(config: Config, store: GraphStore, ids: np.ndarray, device: torch.device) -> Compute:
    return lambda teacher: torch.from_numpy(teacher.taught(ids).astype(np.float32))
