"""What a finished run serves: a student and the graph whose nodes it knows, for which their two folders are enough.

And what it found: the results of its evaluation.
"""

from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from rbm_dist import storage
from rbm_dist.config.run import Config, StudentConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.encodings import POS, PROP
from rbm_dist.graph.shards import FEAT_SCALE, SPARSE_FEAT
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.serve.artifact import load_mixture
from rbm_dist.stages import run as run_
from rbm_dist.stages.pipeline import STAGES, stages_of
from rbm_dist.stages.run import Files


def graph_of(url: str, kind: str, arrays: tuple[str, ...]) -> GraphStore:
    """The graph of a finished run, verified with one of its students; `graph/` and `student/` must be there.

    arrays: those of the graph that the caller reads besides the student's inputs.
    Raises `InputError` if that is no run, one that has not finished, or damaged.
    """
    return _open_graph(url, kind, arrays)[0]


def open_mixture(url: str, arrays: tuple[str, ...]) -> tuple[Student, bool, GraphStore, int]:
    """The RbM with all its experts, whether it is served as an MLP, the graph, the run's seed; as `graph_of`."""
    store, seed = _open_graph(url, "rbm", arrays)
    return *load_mixture(storage.join(storage.absolute(url), "student", "rbm")), store, seed


def open_results(url: str) -> dict[str, Any]:
    """`results.json` of a finished run, from the files of its stages, where it is verified.

    Raises `InputError` if that is no run, one that has not finished, or damaged.
    """
    url = storage.absolute(url)
    _students(url)
    before, evaluate = STAGES[-2:]
    made_from, done = run_.started(evaluate, url), run_.manifest(evaluate, url)
    if done is None or made_from is None or made_from["upstream"] != run_.digest(before, url):
        raise InputError(f"{url}: the run has not finished; run the same `rbm-dist run` again first")
    storage.verify(url, done["files"], done.get("times"))
    figures = storage.read_json(storage.join(url, evaluate.folder, "figures.json"))
    return {**figures, "seconds": run_.seconds(STAGES, url)}


def _open_graph(url: str, kind: str, arrays: tuple[str, ...]) -> tuple[GraphStore, int]:
    """The graph of a finished run and its seed; verifies what is read of it and of a student."""
    url = storage.absolute(url)
    settings, seed, files, times = _students(url)
    if kind not in settings.models:
        raise InputError(f"{url}: this run has no student {kind} (student.models: {', '.join(settings.models)})")
    graph = storage.join(url, "graph")
    for name in {POS, PROP}.intersection(settings.inputs):
        index = storage.read_json(storage.join(graph, f"{name}.json"))
        files |= {f"graph/{file}": info for file, info in index["files"].items()}
    stems = {"graph", *arrays, *settings.inputs, PurePosixPath(FEAT_SCALE).stem, *SPARSE_FEAT}
    folders = {"graph": stems, f"student/{kind}": {"model"}}
    storage.verify(
        url,
        {
            name: info
            for name, info in files.items()
            for folder, wanted in folders.items()
            if name.startswith(f"{folder}/") and PurePosixPath(name).stem in wanted
        },
        times,
    )
    return GraphStore.open(graph), seed


def _students(url: str) -> tuple[StudentConfig, int, Files, dict[str, str]]:
    """What the students of a finished run were trained with, the seed, all stages' files and their times."""
    started = {stage.name: run_.started(stage, url) for stage in STAGES}
    student = started["student"]
    if student is None and not storage.exists(storage.join(url, "config.json")):
        raise InputError(f"{url}: not a run directory (no student/config.json)")
    unfinished = InputError(f"{url}: the run has not finished its students; run the same `rbm-dist run` again first")
    if student is None:
        raise unfinished
    if started["partition"] is None:
        raise InputError(f"{url}/graph: not there, or not a run's; the graph is needed beside the students")
    try:
        config = student["config"]
        settings, seed = StudentConfig.model_validate(config["student"]), int(config["seed"])
        stages = stages_of(Config(run_dir=url, encodings=config["encodings"]))[:-1]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{url}/student/config.json: was changed, or written by another version") from None
    files: Files = {}
    times: dict[str, str] = {}
    for stage in stages:
        if started[stage.name] is not None:
            manifest = run_.manifest(stage, url)
            if manifest is None:
                raise unfinished
            files |= manifest["files"]
            times |= manifest.get("times", {})
    for before, stage in pairwise(stages):  # one was computed again, but not yet all that comes of it
        made_from = started[stage.name]
        if started[before.name] and made_from and made_from["upstream"] != run_.digest(before, url):
            raise unfinished
    return settings, seed, files, times
