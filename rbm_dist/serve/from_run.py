"""A finished run's student as an exported one would be: what `model.json` says and the arrays.

Of the run, `graph/` and `student/` are read; accuracy comes from `results.json`, if it is there.
"""

from pathlib import PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from rbm_dist import __version__, storage
from rbm_dist.errors import InputError
from rbm_dist.serve import format as format_
from rbm_dist.serve.format import Column, Features, ModelFile, NetworkFacts, NodeId
from rbm_dist.sources.scaling import SCALING as SCALING_FILES
from rbm_dist.sources.scaling import Scaling

_STUDENT_VERSION = 3  # of a run's own model.json, see `serve/artifact.py`
_UNNAMED = "feat"  # the one list that the features of a source without columns are


def read_run(url: str, kind: str) -> tuple[ModelFile, dict[str, np.ndarray]]:
    """What is to be known of a student, and its arrays. Raises `InputError` for what is no finished run or damaged."""
    url = storage.absolute(url)
    files = _files(url, "student") | _files(url, "graph")
    folder = f"student/{kind}"
    if f"{folder}/model.json" not in files:
        there = sorted({PurePosixPath(name).parts[1] for name in files if name.endswith("/model.json")})
        raise InputError(f"{url}: this run has no student {kind}; it has {', '.join(there)}")
    read = [f"{folder}/model.json", f"{folder}/model.safetensors", "graph/graph.json"]
    read += [name for name in (f"graph/{each}.npy" for each in SCALING_FILES) if name in files]
    storage.verify(url, {name: files[name] for name in read})
    facts = storage.read_json(storage.join(url, folder, "model.json"))
    if facts.pop("version", None) != _STUDENT_VERSION:
        raise InputError(f"{url}/{folder}/model.json: not a model of version {_STUDENT_VERSION}")
    network = NetworkFacts.model_validate(facts)
    graph = storage.read_json(storage.join(url, "graph", "graph.json"))
    scaling = _scaling(url, files, graph["num_features"])
    tensors = _weights(storage.join(url, folder, "model.safetensors"))
    tensors |= {"scaling.columns": np.stack([scaling.fill, scaling.shift, scaling.factor])}
    tensors |= {"scaling.indicators": scaling.indicators.astype(np.int64)}
    features = _features(graph, scaling)
    widths = _input_widths(network, graph, scaling)
    id_type = graph.get("id_type", {"kind": "text" if "orig_name" in graph["dtypes"] else "integer", "arrow": "int64"})
    table = graph.get("table") or {}
    model = ModelFile(
        name=kind,
        rbm_dist=__version__,
        network=network,
        class_names=None if graph.get("class_names") is None else tuple(graph["class_names"]),
        inputs=widths,
        features=features,
        id=NodeId(column=table.get("id"), read_as=table.get("id_type", "auto"), **id_type),
        made_from=_made_from(url, kind, graph),
    )
    return model, tensors


def _files(url: str, folder: str) -> dict[str, storage.FileInfo]:
    path = storage.join(url, folder, "manifest.json")
    if not storage.exists(path):
        if storage.exists(storage.join(url, folder)):
            raise InputError(f"{url}: the run has not finished ({folder}/); run the same `rbm-dist run` again first")
        raise InputError(f"{url}: neither an exported student nor a run (no {format_.JSON} and no {folder}/)")
    return storage.read_json(path)["files"]


def _scaling(url: str, files: dict[str, storage.FileInfo], num_features: int) -> Scaling:
    names = {name: f"graph/{name}.npy" for name in SCALING_FILES}
    if not set(names.values()) <= files.keys():  # written before features were scaled on the way to the parts
        none = np.zeros(num_features)
        return Scaling(none, none, np.ones(num_features), "", np.empty(0, np.int64))
    return Scaling.from_arrays(
        {name: storage.open_array(storage.join(url, file), files[file]) for name, file in names.items()}
    )


def _weights(url: str) -> dict[str, np.ndarray]:
    fs, path = storage.filesystem(url)
    try:
        return load_tensors(fs.cat_file(path))
    except SafetensorError as error:
        raise InputError(f"{url}: not the weights of a model: {error}") from None


def _features(graph: dict[str, Any], scaling: Scaling) -> Features:
    width = len(scaling.fill)
    table = graph.get("table") or {}
    columns = [Column(name=_UNNAMED, how="list", type="numbers", width=width)]
    if table.get("columns"):
        columns = [Column.model_validate(each) for each in table["columns"]]
    words = {name: table[name] for name in ("na_values", "thousands", "decimal") if name in table}
    return Features(
        columns=tuple(columns), named=bool(table.get("columns")), missing=graph.get("missing", "refuse") != "refuse",
        rows=scaling.rows, **words,
    )  # fmt: skip


def _input_widths(network: NetworkFacts, graph: dict[str, Any], scaling: Scaling) -> dict[str, int]:
    """Widths by input: `prop` has one per class, `pos` what is left of the network's."""
    known = {"feat": scaling.num_features, "prop": graph["num_classes"]}
    left = network.num_features - sum(known.get(name, 0) for name in network.inputs)
    return {name: len(scaling.fill) if name == "feat" else known.get(name, left) for name in network.inputs}


def _made_from(url: str, kind: str, graph: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "run": PurePosixPath(url).name,
        "graph": {name: graph[name] for name in ("num_nodes", "num_edges", "num_features", "num_classes")},
    }
    results = storage.join(url, "results.json")
    if storage.exists(results):
        found = storage.read_json(results)
        student, teacher = found["students"].get(kind, {}), found["teacher"]
        made["accuracy"] = {split: value for split, value in student.items() if split != "mixture"}
        made["teacher_accuracy"] = teacher
        if "mixture" in student:
            made["merged"] = student["mixture"]["merged"]
    return made
