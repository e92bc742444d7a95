"""Stage `partition`: assign every node to a part, and shuffle the staged source into the parts' shards."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph import shuffle
from rbm_dist.graph.partition import partition
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.graph.shuffle import SPILL, Layout, Numbering, Spill
from rbm_dist.sources.staged import SparseRows, StagedSource, open_edges
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.source import Over, below, over_tasks

_ABOUT = ("num_classes", "class_names", "id_type", "feature_names", "missing", "table")
"""What of `source.json` goes on with the graph: it is asked for when predictions are."""


def run_partition(run: Run) -> Files:
    """Write the parts below `<run>/graph/`, `graph.json` last. In Ray tasks."""
    files = below(run.files_of("source"), "source")
    written = write_graph(run.config, run.path("source"), files, run.graph_url, over_tasks(run, "partition"))
    report = storage.read_json(storage.join(run.graph_url, "graph.json"))["partition"]
    note = (
        f"{report['cut_share']:.1%} of the edges cut, largest part {report['node_balance']:.2f} times the mean nodes "
        f"and {report['edge_balance']:.2f} times the edges, replication {report['replication']:.2f}"
    )
    parts = run.config.partition.num_parts
    run.reporter.progress("partition: parts", parts, parts, "parts", note)
    return {f"graph/{name}": info for name, info in written.items()}


def write_graph(config: Config, source_url: str, files: Files, graph_url: str, over: Over) -> Files:
    """Partition a staged source and write its parts; gives all files by their path below `graph_url`."""
    spill_url, num_parts = storage.join(graph_url, SPILL), config.partition.num_parts
    facts = storage.read_json(storage.join(source_url, "source.json"))
    feat_ends = facts.get("feat_ends")  # other versions did not note them
    source, features = StagedSource.open(source_url, files, feat_ends), config.partition.features
    if isinstance(source.feat, SparseRows) and features != "float32":
        raise InputError(
            f"partition.features: {features} is for dense features; those of this source are mostly zeros and are kept "
            "as a sparse matrix of float32. Set partition.features: float32"
        )
    (assigned,) = over("assignment", assign_parts, [(config, source_url, files, spill_url)])
    chunks = [
        (source_url, files, feat_ends, spill_url, assigned["files"], assigned["offsets"], chunk, first, stop)
        for chunk, (first, stop) in enumerate(itertools.pairwise(assigned["chunk_bounds"]))
    ]
    spills = over("chunks", spill_chunk, chunks)
    layout = Layout.of(source, features, np.max([spill.feat_max for spill in spills], axis=0))
    parts = _PartTasks(num_parts, lambda part: (graph_url, part, spill_url, shuffle.plan_part(spills, part), layout))
    written: Files = {}
    for part_files in over("parts", shuffle.write_part, parts):
        written |= part_files
    about = {name: facts[name] for name in _ABOUT if name in facts}
    written = shuffle.write_index(graph_url, assigned["offsets"], source, about, written, assigned["report"], layout)
    storage.remove_work(spill_url)
    return written


@dataclass(frozen=True)
class _PartTasks:
    """What each part's task is given, made as it is handed over: all have a slice per array, chunk and part."""

    num_parts: int
    make: Callable[[int], tuple]

    def __len__(self) -> int:
        return self.num_parts

    def __iter__(self) -> Iterator[tuple]:
        return map(self.make, range(self.num_parts))


def assign_parts(config: Config, source_url: str, files: Files, spill_url: str) -> dict[str, Any]:
    """Assign every node to a part and number the nodes anew, on disk. Gives files, offsets and report."""

    def work() -> dict[str, Any]:
        csc = open_edges(source_url, files)
        # An unseen node's edges lead to it, not from it.
        symmetric = config.source.symmetric and not config.source.unseen_share
        part_N = partition(csc, config.partition, config.seed, symmetric)
        numbering = Numbering.of(part_N, config.partition.num_parts)
        arrays = {"part": part_N, "new_id": numbering.new_id}
        return {
            "files": {
                name: storage.write_array(storage.join(spill_url, f"{name}.npy"), array)
                for name, array in arrays.items()
            },
            "offsets": numbering.offsets.tolist(),
            "chunk_bounds": shuffle.chunk_bounds(csc.indptr).tolist(),
            "report": partition_report(csc, part_N, config.partition.num_parts),
        }

    return storage.once(storage.join(spill_url, "assignment.json"), work)


def spill_chunk(
    source_url: str,
    files: Files,
    feat_ends: list[int] | None,
    spill_url: str,
    assigned: Files,
    offsets: list[int],
    chunk: int,
    first: int,
    stop: int,
) -> Spill:
    """Group one chunk of the source's rows by part."""
    part = storage.open_rows(storage.join(spill_url, "part.npy"), assigned["part"])
    new_id = storage.open_array(storage.join(spill_url, "new_id.npy"), assigned["new_id"])
    source = StagedSource.open(source_url, files, feat_ends)
    return shuffle.spill_chunk(spill_url, chunk, first, stop, source, Numbering(part, new_id, np.array(offsets)))
