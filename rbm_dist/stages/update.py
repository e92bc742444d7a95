"""A run of a graph that has changed: the stages of any run, but for what can be taken over from the run before.

The new run is a run directory of its own, whole without the one before, which stays as it is. Files that did not
change are links to the old ones, where the storage has such. The stage `source` reads the changes; `partition` makes a
new version of the graph; `teacher` takes over the old one; `soft_labels` computes the rows that can differ
(`graph/reach.py`); `student` trains the old ones a little further on these, and on as many others. Where too much has
changed (`update.anew_above`), teacher, soft labels and students are made as if there were no run before.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.config.teacher import GCN
from rbm_dist.config.update import UpdateConfig
from rbm_dist.graph import reach, version
from rbm_dist.graph.changes import ARRAYS, Changes
from rbm_dist.graph.reach import LEARN, TOUCHED, UNTOUCHED
from rbm_dist.graph.smooth import smooths
from rbm_dist.graph.store import SOFT, GraphStore
from rbm_dist.graph.version import NewPart
from rbm_dist.randomness.bits import generator
from rbm_dist.randomness.words import Word
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.serve.changed_tables import read_changes
from rbm_dist.serve.from_run import read_run
from rbm_dist.stages.inputs import note_input
from rbm_dist.stages.run import Files, Run, Stage
from rbm_dist.stages.smooth import FIGURES
from rbm_dist.stages.soft_labels import Before, kept_layers, run_soft_labels
from rbm_dist.stages.source import Over, below, over_tasks
from rbm_dist.stages.student import run_student
from rbm_dist.stages.teacher import run_teacher

_MOVED = 0.05  # in a probability: students are trained on what a node then is
_COMPARED = 1 << 14  # nodes whose soft labels are compared at a time
FACTS, LABELS = "changes.json", "changed_labels.json"
_MAKES = rf"({ARRAYS})\.npy|{FACTS}|inputs\.json"


def update_stages(stages: list[Stage]) -> list[Stage]:
    """The stages of a run, as they are for one that goes on from another."""
    read = [name for name in UpdateConfig.model_fields if name not in ("epochs", "anew_above")]
    other: dict[str, dict[str, Any]] = {
        "source": {"work": run_changes, "sections": ("source", *(f"update.{name}" for name in read)), "makes": _MAKES},
        "partition": {"work": run_version},
        "teacher": {"work": _teacher, "sections": ("teacher", "update.anew_above")},
        "soft_labels": {"work": _soft_labels, "makes": "|".join(map(re.escape, (FIGURES, LABELS)))},
        "student": {"work": _student, "sections": ("encodings", "student", "update.epochs")},
    }
    return [replace(stage, **other.get(stage.name, {})) for stage in stages]


def run_changes(run: Run, over: Over | None = None) -> Files:
    """Read what has changed; writes it below `<run>/source/`, and `changes.json`: what there is of it."""
    over = over or over_tasks(run, "source")
    (files,) = over("changes", _read, [(run.config, run.path("source"))])
    return {f"source/{name}": info for name, info in files.items()}


def _read(config: Config, url: str) -> Files:
    update = _update(config)
    note_input(update, url)
    store = _graph_before(config)
    model, tensors = read_run(update.run, config.student.models[0])
    changes, counts = read_changes(update, config.source, store, model, tensors)
    edited = np.unique(np.concatenate([changes.added_m2[:, 0], changes.dropped_m2[:, 0]]))
    others = np.union1d(edited[edited < store.num_nodes], changes.changed_c)
    total = store.num_nodes + changes.num_new
    facts = {
        "run": update.run, "nodes_before": store.num_nodes, "edges_before": store.num_edges, **counts,
        "edges_given": len(changes.added_m2), "drops_given": len(changes.dropped_m2),
        "share": (changes.num_new + len(others)) / total,
    }  # fmt: skip
    return changes.write(url) | {FACTS: storage.write_json(storage.join(url, FACTS), facts)}


def run_version(run: Run, over: Over | None = None) -> Files:
    """Write the new version of the graph below `<run>/graph/`."""
    config, files = run.config, below(run.files_of("source"), "source")
    over = over or over_tasks(run, "partition")
    store = _graph_before(config)
    changes = Changes.open(run.path("source"), files)
    index = storage.read_json(storage.join(store.url, "graph.json"))
    offsets, added_parts = version.new_offsets(store, changes.num_new, index.get("added_parts", 0))
    name_bytes = _name_bytes(store, changes)
    parts = [
        (config, run.graph_url, run.path("source"), files, part, offsets, name_bytes)
        for part in range(len(offsets) - 1)
    ]
    written: list[NewPart] = over("parts", _write_part, parts)
    made = version.write_index(run.graph_url, store, index, offsets, added_parts, written, name_bytes)
    return {f"graph/{name}": info for name, info in made.items()}


def _write_part(
    config: Config, graph_url: str, changes_url: str, files: Files, part: int, offsets: np.ndarray, name_bytes: int
) -> NewPart:  # fmt: skip
    changes = Changes.open(changes_url, files)
    return version.write_part(graph_url, _graph_before(config), part, offsets, changes, name_bytes)


def _name_bytes(store: GraphStore, changes: Changes) -> int:
    if not store.named:
        return 0
    names = [store.array("orig_name", part) for part in range(store.num_parts)] + [changes.new["orig_name"]]
    return max(each.dtype.itemsize for each in names)


def _teacher(run: Run) -> Files:
    if is_anew(run):
        return run_teacher(run)
    return _take_over(run, ["teacher/model.safetensors"])


def _soft_labels(run: Run) -> Files:
    (touched,) = run_tasks("soft_labels", write_touched, [(run,)], run.config.cluster)
    before = None if is_anew(run) else usable_before(run)
    files = run_soft_labels(run, before)
    (labels,) = run_tasks("soft_labels", write_learn, [(run, before is not None)], run.config.cluster)
    return files | touched | labels


def usable_before(run: Run) -> Before | None:
    """Where the rows that cannot differ are; None if all have to be computed."""
    config, url = run.config, _graph_before(run.config).url
    if not config.teacher.is_gnn or smooths(config.soft_labels):
        return None
    kept = kept_layers(config) if config.soft_labels.inference == "exact" else []
    return Before(url) if all(storage.exists(storage.join(url, f"{name}.json")) for name in kept) else None


def write_touched(run: Run) -> Files:
    """Write the array TOUCHED, see `reach`; one that is there is kept."""
    store = GraphStore.open(run.graph_url)
    if not storage.exists(run.path("graph", f"{TOUCHED}.json")):
        changes = Changes.open(run.path("source"), below(run.files_of("source"), "source"))
        first_new = storage.read_json(run.path("source", FACTS))["nodes_before"]
        rows = np.concatenate([changes.changed_c, np.arange(first_new, store.num_nodes)])
        destinations = np.unique(np.concatenate([changes.added_m2[:, 0], changes.dropped_m2[:, 0]]))
        if run.config.teacher.conv == GCN:  # who weighs what a neighbour says by that neighbour's degree
            rows = np.union1d(rows, destinations)
        _publish(store, TOUCHED, reach.reach(store, rows, destinations, _hops(run.config)))
    return _files(run, TOUCHED)


def _publish(store: GraphStore, name: str, rows_N: np.ndarray) -> None:
    of_parts = np.split(rows_N, store.offsets[1:-1])
    store.publish(name, [store.write_part(name, part, rows.dtype, (), [rows]) for part, rows in enumerate(of_parts)])


def _files(run: Run, name: str) -> Files:
    files = storage.read_json(run.path("graph", f"{name}.json"))["files"]
    return {f"graph/{file}": info for file, info in files.items()}


def _hops(config: Config) -> int:
    return len(config.teacher.fanout) if config.teacher.is_gnn else config.teacher.hops


def write_learn(run: Run, kept: bool) -> Files:
    """Write the array LEARN, `[N]` bool: nodes that students are trained on further; and what became of soft labels.

    Those are the nodes that are new, that have other features, or whose soft labels moved, and as many of all others,
    against forgetting. kept: whether rows were taken over from the graph before.
    """
    config, store, before = run.config, GraphStore.open(run.graph_url), _graph_before(run.config)
    reached, other, largest, compared = np.zeros(_hops(config) + 1, np.int64), 0, 0.0, 0
    learn_N = np.zeros(store.num_nodes, bool)
    for part in range(store.num_parts):
        touched = store.array(TOUCHED, part)
        reached += np.bincount(touched[touched != UNTOUCHED], minlength=len(reached))
        ids = store.ids(part)
        learn_N[ids[touched == 0]] = True
        may_differ = (touched != UNTOUCHED) | (not kept)
        ids = ids[may_differ & (ids < before.num_nodes)]
        compared += len(ids)
        for start in range(0, len(ids), _COMPARED):
            some = ids[start : start + _COMPARED]
            new_nC, old_nC = store.gather(SOFT, some), before.gather(SOFT, some)
            moved_n = np.abs(new_nC - old_nC).max(axis=1)
            learn_N[some[moved_n > _MOVED]] = True
            other += int((new_nC.argmax(1) != old_nC.argmax(1)).sum())
            largest = max(largest, float(moved_n.max()))
    own = int(learn_N.sum())
    for part in range(store.num_parts):
        low, high = store.offsets[part : part + 2]
        draw = generator(config.seed, Word.UPDATE_REPLAY, part)
        learn_N[low:high] |= draw.random(high - low) < own / max(1, store.num_nodes - own)
    _publish(store, LEARN, learn_N)
    facts = {
        "reached": np.cumsum(reached).tolist(), "nodes": store.num_nodes, "compared": compared, "other_class": other,
        "largest_change": largest, "moved": own, "kept": kept, "anew": is_anew(run),
    }  # fmt: skip
    written = storage.write_json(run.path("soft_labels", LABELS), facts)
    return _files(run, LEARN) | {f"soft_labels/{LABELS}": written}


def _student(run: Run) -> Files:
    update = _update(run.config)
    if is_anew(run):
        return run_student(run)
    if not trains_further(run):
        before = storage.read_json(storage.join(update.run, "student", "manifest.json"))["files"]
        return _take_over(run, sorted(before))
    return run_student(run, storage.join(update.run, "student"))


def trains_further(run: Run) -> bool:
    """Whether students have anything new to learn."""
    moved = storage.read_json(run.path("soft_labels", LABELS))["moved"]
    return bool(_update(run.config).epochs and moved)


def is_anew(run: Run) -> bool:
    """Whether so much has changed that all is made anew."""
    facts = storage.read_json(run.path("source", FACTS))
    return bool(facts["share"] > _update(run.config).anew_above)


def update_facts(run_url: str) -> dict[str, Any]:
    """What an update found and did, for people; of a run that is done."""
    facts = storage.read_json(storage.join(run_url, "source", FACTS))
    graph = storage.read_json(storage.join(run_url, "graph", "graph.json"))
    labels = storage.read_json(storage.join(run_url, "soft_labels", LABELS))
    return facts | graph["update"] | labels


def _take_over(run: Run, files: list[str]) -> Files:
    """Have the same files as the run before."""
    taken = {}
    for name in files:
        storage.link(storage.join(_update(run.config).run, name), run.path(name))
        taken[name] = storage.file_info(run.path(name))
    return taken


def _graph_before(config: Config) -> GraphStore:
    return GraphStore.open(storage.join(_update(config).run, "graph"))


def _update(config: Config) -> UpdateConfig:
    assert config.update is not None
    return config.update
