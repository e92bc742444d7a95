"""A look at a source: its summary, with nothing written, and of large inputs no more read than a few blocks."""

import tempfile
from itertools import chain
from typing import Any

import numpy as np

from rbm_dist.config.source import OgbConfig, SourceSection, SyntheticConfig, TablesConfig
from rbm_dist.graph.splits import NO_SPLIT, split_per_class
from rbm_dist.sources import source, table_look
from rbm_dist.sources.facts import source_facts
from rbm_dist.sources.scaling import Moments, Scaling
from rbm_dist.sources.streamed import About
from rbm_dist.sources.summary import summarise


def dry_run(config: SourceSection, seed: int) -> tuple[dict[str, Any], str]:
    """The summary of a source, and which of it is of the whole. Raises `InputError` as reading it would."""
    if isinstance(config, TablesConfig):
        return table_look.summary_of_look(config), (
            "Counts of classes, unlabelled nodes and splits, what columns of text hold, and ranges that no footer says "
            "are those of the first rows; rows of text files are estimated from their sizes."
        )
    if isinstance(config, OgbConfig | SyntheticConfig):
        return _of_facts(config, seed), "Sizes are those that the dataset announces."
    if source.is_streamed(config):
        with tempfile.TemporaryDirectory() as scratch:
            opened = source.open_streamed(config, seed, scratch)
            nodes = opened.nodes()
            split_N = nodes.split
            if split_N is None:
                split_N = split_per_class(nodes.label, config.train_per_class, config.val_per_class, seed)
            pieces = range(len(opened.feat_offsets) - 1)
            moments = Moments.of(chain.from_iterable(map(opened.feat, pieces)), opened.num_features)
            edges = {"read": opened.num_edges or 0}
            about, classes, sparse, label_N = opened.about, opened.num_classes, False, nodes.label
    else:
        graph = source.read(config, seed)
        moments = Moments.of(graph.feat_chunks(), graph.num_features)
        edges = {"read": graph.read_edges, "self_loops": graph.dropped_self_loops, "kept": graph.csc.num_edges}
        edges |= {"duplicates": graph.dropped_duplicates}
        about, classes, sparse = graph.about, graph.num_classes, graph.sparse_feat
        label_N, split_N = graph.label, graph.split
    scaling = Scaling.of(config, moments, sparse)
    return summarise(config, about, classes, label_N, split_N, edges, moments, scaling), "All of it was read."


def _of_facts(config: SourceSection, seed: int) -> dict[str, Any]:
    facts = source_facts(config, seed)
    moments = Moments.of((), facts.num_features)
    about = About(notes={"nodes": facts.note, "split": "the source's own"})
    none = np.full(0, NO_SPLIT)
    scaling = Scaling.of(config, moments, sparse=False)
    edges = {"kept": facts.num_edges}
    found = summarise(config, about, facts.num_classes, none, none, edges, moments, scaling)
    found["nodes"]["rows"] = facts.num_nodes
    found["split"] |= {"train": facts.num_train, "val": facts.num_val, "test": facts.num_test or 0}
    found["warnings"] = []
    return found
