"""Stage `source`: read and check the input, and stage its arrays for the partitioner and the shuffle.

A small source is read by one task. A streamed one by many: its edges are sorted in runs and merged to a CSC, its
features are checked and their statistics gathered piece by piece; each task's result is kept, so that none is done
twice as long as the input's files are the same.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import id_dtype
from rbm_dist.graph.shards import ORIG_NAME
from rbm_dist.graph.splits import SPLIT_NAMES, UNSEEN, check_split, hidden_split, split_per_class
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.sources import edges, staged
from rbm_dist.sources import source as source_
from rbm_dist.sources.edges import Merge
from rbm_dist.sources.scaling import Moments, Scaling
from rbm_dist.sources.streamed import About, Edges, StreamedSource
from rbm_dist.sources.summary import summarise
from rbm_dist.stages.inputs import note_input
from rbm_dist.stages.run import Files, Run

_WORK = "work"
_PER_NODE = ("label", "split")
_log = logging.getLogger(__name__)


class Arguments(Protocol):
    """What a function is called with: a list, or something that makes each tuple when it is asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple]: ...


Over = Callable[[str, Callable[..., Any], Arguments], list[Any]]
"""`over(unit, function, arguments)`: the function's results for all arguments, in order. In Ray tasks, or here."""


def over_tasks(run: Run, stage: str) -> Over:
    """Calls in Ray tasks, with progress."""

    def over(unit: str, function: Callable[..., Any], arguments: Arguments) -> list[Any]:
        def show(done: int) -> None:
            if len(arguments) > 1:
                run.reporter.progress(f"{stage}: {unit}", done, len(arguments), unit)

        return run_tasks(stage, function, arguments, run.config.cluster, show)

    return over


def over_here(unit: str, function: Callable[..., Any], arguments: Arguments) -> list[Any]:
    """Calls in this process, one after another."""
    return [function(*each) for each in arguments]


def run_source(run: Run) -> Files:
    """Stage the source below `<run>/source/`. In Ray tasks."""
    return stage_source(run.config, run.path("source"), over_tasks(run, "source"))


def stage_source(config: Config, url: str, over: Over) -> Files:
    """Read the source and write its arrays and `source.json` below `url`; file names start with `source/`."""
    if source_.is_streamed(config.source):
        files = _stage_streamed(config, url, over)
    else:
        (files,) = over("sources", _stage_in_memory, [(config, url)])
    return {f"source/{name}": info for name, info in files.items()}


def below(files: Files, folder: str) -> Files:
    """File names without the folder they start with."""
    return {name.removeprefix(f"{folder}/"): info for name, info in files.items()}


def _stage_in_memory(config: Config, url: str) -> Files:
    note_input(config.source, url)
    graph = source_.read(config.source, config.seed)
    files = staged.write_source(url, graph)
    rows, moments = 0, Moments.of((), graph.num_features)
    for chunk in graph.feat_chunks():
        seen = np.flatnonzero(graph.split[rows : rows + chunk.shape[0]] != UNSEEN)
        moments = moments + Moments.of([chunk[seen]], graph.num_features)
        rows += chunk.shape[0]
    edge_counts = {
        "read": graph.read_edges, "self_loops": graph.dropped_self_loops, "duplicates": graph.dropped_duplicates,
        "kept": graph.csc.num_edges,
    }  # fmt: skip
    return files | _write_facts(
        config, url, graph.about, graph.num_classes, graph.label, graph.split, edge_counts, moments,
        None if graph.sparse_feat else [graph.csc.num_nodes],
    )  # fmt: skip


def _write_facts(
    config: Config,
    url: str,
    about: About,
    num_classes: int,
    label_N: np.ndarray,
    split_N: np.ndarray,
    edge_counts: dict[str, int],
    moments: Moments,
    feat_ends: list[int] | None,
) -> Files:
    """Write how features are scaled, and `source.json`. feat_ends: the rows up to each piece's end; None of sparse."""
    scaling = Scaling.of(config.source, moments, feat_ends is None)
    files = staged.write_scaling(url, scaling, moments)
    facts: dict[str, Any] = {
        "num_nodes": len(label_N), "num_edges": edge_counts["kept"], "num_features": scaling.num_features,
        "num_classes": num_classes, "dropped_self_loops": edge_counts["self_loops"],
        "dropped_duplicates": edge_counts["duplicates"], "dropped_unknown": edge_counts.get("unknown", 0),
        "split": {name: int(np.sum(split_N == code)) for code, name in SPLIT_NAMES.items()},
        "class_names": about.class_names, "id_type": asdict(about.id_type), "missing": config.source.missing,
        "feat_ends": feat_ends,
    }  # fmt: skip
    if about.table is not None:
        facts["table"] = about.table
    if about.features is not None:
        names = [name for name, _ in about.features]
        facts["feature_names"] = names + [f"{names[k]} is missing" for k in scaling.indicators]
    facts["summary"] = summarise(config.source, about, num_classes, label_N, split_N, edge_counts, moments, scaling)
    return files | {"source.json": storage.write_json(storage.join(url, "source.json"), facts)}


def _stage_streamed(config: Config, url: str, over: Over) -> Files:
    (nodes,) = over("node tables", _stage_nodes, [(config, url)])
    kept = nodes["kept"]
    if nodes["changed"]:
        _log.warning("%s: the input's files were changed or moved; it is read again from the start", url)
    pieces = [(config, url, kept, piece, nodes["files"]) for piece in range(nodes["num_edge_pieces"])]
    sorted_pieces = over("edge pieces", _sort_edges, pieces)
    runs = [edges.Run(**run) for piece in sorted_pieces for run in piece["runs"]]
    unknown = sum(piece["unknown"] for piece in sorted_pieces)
    merges = [
        (kept, index, wanted, nodes["num_nodes"])
        for index, wanted in enumerate(edges.plan_merges(runs, nodes["num_nodes"]))
    ]
    merged = over("merges", _merge_edges, merges)
    feat_pieces = [(config, url, kept, piece, nodes["files"]) for piece in range(nodes["num_feat_pieces"])]
    feats = over("feature pieces", _stage_feat, feat_pieces)
    (files,) = over("joins", _join, [(config, url, nodes, [run.__dict__ for run in runs], unknown, merged, feats)])
    files |= {staged.feat_piece(piece): feat["info"] for piece, feat in enumerate(feats)}
    storage.remove_work(storage.join(url, _WORK))
    return files


def _stage_nodes(config: Config, url: str) -> dict[str, Any]:
    """`kept`: the folder of what all tasks give. `changed`: whether there was such a folder for other input files."""
    note_input(config.source, url)
    source = source_.open_streamed(config.source, config.seed, storage.join(url, _WORK))
    old = [name for name in storage.listdir(storage.join(url, _WORK)) if not name.endswith(source.fingerprint)]
    for name in old:  # even if those files came back, what is staged beside the folder would not be theirs
        storage.remove(storage.join(url, _WORK, name))
    # What is kept there names files relative to it, so that a run can be moved; in "staged-…" it did not.
    kept = storage.join(url, _WORK, f"pieces-{source.fingerprint}")

    def work() -> dict[str, Any]:
        nodes = source.nodes()
        label, split = nodes.label, nodes.split
        if split is None:
            settings = config.source
            split = split_per_class(label, settings.train_per_class, settings.val_per_class, config.seed)
        check_split(source.name, label, split)
        if config.source.unseen_share:
            split = hidden_split(split, config.source.unseen_share, config.seed)
        arrays = {"label": label, "split": split, "orig_id": nodes.orig_id}
        if nodes.orig_id.dtype.kind == "S":
            arrays |= {"orig_id": np.arange(source.num_nodes), ORIG_NAME: nodes.orig_id}
        return {
            "files": {
                f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), array)
                for name, array in arrays.items()
            },
            "num_nodes": source.num_nodes, "num_features": source.num_features, "num_classes": source.num_classes,
            "num_edge_pieces": source.num_edge_pieces, "num_feat_pieces": len(source.feat_offsets) - 1,
        }  # fmt: skip

    return {**storage.once(storage.join(kept, "nodes.json"), work), "kept": kept, "changed": bool(old)}


def _reopened(config: Config, url: str, kept: str) -> StreamedSource:
    """The source, opened once per process: to list very many files anew for every task would be quadratic."""
    return _open_once(config.model_dump_json(), url, kept)


@functools.lru_cache(maxsize=1)
def _open_once(config_json: str, url: str, kept: str) -> StreamedSource:
    # `kept` is named after the files' stamps: of files that were changed another source is opened.
    config = Config.model_validate_json(config_json)
    return source_.open_streamed(config.source, config.seed, storage.join(url, _WORK))


def _sort_edges(config: Config, url: str, kept: str, piece: int, node_files: Files) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        unknown = 0

        def known(chunks: Iterator[Edges]) -> Iterator[Edges]:
            nonlocal unknown
            for src_M, dst_M in chunks:
                keep = (src_M >= 0) & (dst_M >= 0) if drops else slice(None)
                unknown += len(src_M) - len(src_M[keep])
                yield src_M[keep], dst_M[keep]

        # Of other sources an end below 0 is a mistake, which is refused where edges are sorted.
        drops = getattr(config.source, "unknown_nodes", "refuse") == "drop"
        source = _reopened(config, url, kept)
        unseen_N = None
        if config.source.unseen_share:
            unseen_N = storage.open_array(storage.join(url, "split.npy"), node_files["split.npy"]) == UNSEEN
        name = storage.join(kept, f"run-{piece:05d}")
        runs = edges.write_runs(name, known(source.edges(piece)), source.num_nodes, source.undirected, unseen_N)
        return {"runs": [run.__dict__ for run in runs], "unknown": unknown}

    return storage.once(storage.join(kept, f"run-{piece:05d}.json"), work)


def _merge_edges(kept: str, index: int, wanted: Merge, num_nodes: int) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        csc, given = edges.merge(kept, wanted, num_nodes)
        arrays = {"degree": np.diff(csc.indptr), "indices": csc.indices}
        files = {name: storage.write_array(_merged(kept, index, name), array) for name, array in arrays.items()}
        return {"files": files, "num_edges": csc.num_edges, "given": given}

    return storage.once(storage.join(kept, f"merge-{index:05d}.json"), work)


def _merged(kept: str, index: int, name: str) -> str:
    return storage.join(kept, f"merge-{index:05d}-{name}.npy")


def _stage_feat(config: Config, url: str, kept: str, piece: int, node_files: Files) -> dict[str, Any]:
    """The file of a piece's features (`info`), and its columns' statistics over the nodes that training sees."""
    moments_name = storage.join(kept, f"moments-{piece:05d}.npy")

    def work() -> dict[str, Any]:
        source = _reopened(config, url, kept)
        first, stop = (int(row) for row in source.feat_offsets[piece : piece + 2])
        seen_n = storage.open_rows(storage.join(url, "split.npy"), node_files["split.npy"])[first:stop] != UNSEEN
        moments, rows = Moments.of((), source.num_features), 0

        def checked() -> Iterator[np.ndarray]:
            nonlocal moments, rows
            for feat_nF in _checked(source, first, piece, config.source.missing != "refuse"):
                some_nF = feat_nF[seen_n[rows : rows + len(feat_nF)]]
                moments, rows = moments + Moments.of([some_nF], source.num_features), rows + len(feat_nF)
                yield feat_nF

        shape = (stop - first, source.num_features)
        info = storage.write_chunks(storage.join(url, staged.feat_piece(piece)), np.float32, shape, checked())
        return {"info": info, "moments": storage.write_array(moments_name, moments.as_array())}

    return storage.once(storage.join(kept, f"feat-{piece:05d}.json"), work)


def _checked(source: StreamedSource, row: int, piece: int, missing: bool) -> Iterator[np.ndarray]:
    """The features of a piece as float32, finite or, if values may be missing, NaN."""
    for chunk_nF in source.feat(piece):
        with np.errstate(over="ignore"):
            feat_nF = chunk_nF.astype(np.float32, copy=False)
        wrong_nF = np.isinf(feat_nF) if missing else ~np.isfinite(feat_nF)
        if wrong_nF.any():
            bad = np.argwhere(wrong_nF)
            advice = "" if missing else "; where NaN says that a value is missing, set source.missing to mean or zero"
            raise InputError(
                f"{source.name}: {len(bad):,} features are NaN, infinite or beyond float32; "
                f"the first is of row {row + bad[0, 0]}, column {bad[0, 1]}{advice}"
            )
        yield feat_nF
        row += len(feat_nF)


def _join(
    config: Config,
    url: str,
    nodes: dict[str, Any],
    runs: list[dict[str, Any]],
    unknown: int,
    merged: list[dict[str, Any]],
    feats: list[dict[str, Any]],
) -> Files:
    def pieces(name: str) -> Iterator[np.ndarray]:
        for index, each in enumerate(merged):
            yield storage.open_rows(_merged(nodes["kept"], index, name), each["files"][name])[:]

    def indptr() -> Iterator[np.ndarray]:
        total = 0
        yield np.zeros(1, np.int64)
        for degree in pieces("degree"):
            ends = total + np.cumsum(degree)
            yield ends
            total = int(ends[-1])

    num_nodes, num_edges = nodes["num_nodes"], sum(each["num_edges"] for each in merged)
    files = dict(nodes["files"])
    files["indptr.npy"] = storage.write_chunks(storage.join(url, "indptr.npy"), np.int64, (num_nodes + 1,), indptr())
    files["indices.npy"] = storage.write_chunks(
        storage.join(url, "indices.npy"), id_dtype(num_nodes), (num_edges,), pieces("indices")
    )
    given, loops, hidden = (sum(run[name] for run in runs) for name in ("given", "self_loops", "hidden"))
    moments = Moments.of((), nodes["num_features"])
    for piece, feat in enumerate(feats):
        array = storage.open_rows(storage.join(nodes["kept"], f"moments-{piece:05d}.npy"), feat["moments"])
        moments = moments + Moments.from_array(array[:])
    label, split = (storage.open_array(storage.join(url, f"{name}.npy"), files[f"{name}.npy"]) for name in _PER_NODE)
    edge_counts = {
        "read": given + unknown, "self_loops": loops, "hidden": hidden, "unknown": unknown,
        "duplicates": given - loops - hidden - sum(each["given"] for each in merged), "kept": num_edges,
    }  # fmt: skip
    source = _reopened(config, url, nodes["kept"])
    num_classes = nodes["num_classes"]
    ends = source.feat_offsets[1:].tolist()
    return files | _write_facts(config, url, source.about, num_classes, label, split, edge_counts, moments, ends)
