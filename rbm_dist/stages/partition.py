"""Stages `source` and `partition`: read and check the input, cut it into parts, write the shards. In Ray tasks."""

import numpy as np

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.graph import shards
from rbm_dist.graph import source as source_
from rbm_dist.graph.partition import edge_cut, partition
from rbm_dist.graph.shards import Numbering, StagedSource
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.stages.run import Files, Run

_ASSIGNMENT = "part_of_node.npy"


def run_source(run: Run) -> Files:
    """Read the source, check it, and stage its arrays below `<run>/source/`."""
    return run_tasks("source", stage_source, [(run.config, run.path("source"))], run.timeout_s)[0]


def run_partition(run: Run) -> Files:
    """Assign every node to a part and write the parts below `<run>/graph/`, `graph.json` last."""
    config, files = run.config, below(run.files_of("source"), "source")
    source_url, graph_url = run.path("source"), run.graph_url
    cut = run_tasks("partition", assign_parts, [(config, source_url, graph_url, files)], run.timeout_s)[0]
    parts = range(config.partition.num_parts)
    reporter = run.reporter
    written: Files = {}
    arguments = [(source_url, graph_url, files, part, len(parts)) for part in parts]
    for done, result in enumerate(run_tasks("partition", write_part, arguments, run.timeout_s), start=1):
        written |= result
        reporter.progress("partition", done, len(parts), "parts")
    write_index(source_url, graph_url, files, written, len(parts), cut)
    index = storage.file_info(storage.join(graph_url, "graph.json"))
    return {f"graph/{name}": info for name, info in {**written, "graph.json": index}.items()}


def stage_source(config: Config, url: str) -> Files:
    """Read the source and write its arrays and `source.json` below `url`; file names start with `source/`."""
    graph = source_.read(config.source, config.seed)
    files = shards.write_source(url, graph)
    facts = {
        "num_nodes": graph.csc.num_nodes,
        "num_edges": graph.csc.num_edges,
        "num_features": graph.num_features,
        "num_classes": graph.num_classes,
        "split": {name: int(np.sum(graph.split == code)) for code, name in source_.SPLIT_NAMES.items()},
        "dropped_self_loops": graph.dropped_self_loops,
        "dropped_duplicates": graph.dropped_duplicates,
    }
    files["source.json"] = storage.write_json(storage.join(url, "source.json"), facts)
    return {f"source/{name}": info for name, info in files.items()}


def assign_parts(config: Config, source_url: str, graph_url: str, files: Files) -> int:
    """Assign every node to a part, on disk. Gives the number of cut edges."""
    source = StagedSource.open(source_url, files)
    part_N = partition(source.csc, config.partition, config.seed)
    storage.write_array(storage.join(graph_url, _ASSIGNMENT), part_N)
    return edge_cut(source.csc, part_N)


def write_part(source_url: str, graph_url: str, files: Files, part: int, num_parts: int) -> Files:
    """Write the shards of one part."""
    numbering = Numbering.of(storage.open_array(storage.join(graph_url, _ASSIGNMENT)), num_parts)
    return shards.write_part(graph_url, part, StagedSource.open(source_url, files), numbering)


def write_index(source_url: str, graph_url: str, files: Files, written: Files, num_parts: int, cut: int) -> None:
    """Write `graph.json`, which makes the parts a graph."""
    source = StagedSource.open(source_url, files)
    assignment = storage.open_array(storage.join(graph_url, _ASSIGNMENT))
    num_classes = storage.read_json(storage.join(source_url, "source.json"))["num_classes"]
    shards.write_index(graph_url, Numbering.of(assignment, num_parts), source, num_classes, written, cut)
    storage.remove(storage.join(graph_url, _ASSIGNMENT))


def below(files: Files, folder: str) -> Files:
    """File names without the folder they start with."""
    return {name.removeprefix(f"{folder}/"): info for name, info in files.items()}
