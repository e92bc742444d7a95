"""The stage `partition` in this process: what it refuses."""

from pathlib import Path

import pytest

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.source import SourceGraph
from rbm_dist.graph.staged import write_source
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.run import Files
from rbm_dist.stages.source import over_here
from tests.small_graph import small_graph, with_sparse_features


def partitioned(folder: Path, graph: SourceGraph, **partition: object) -> Files:
    files = write_source(f"{folder}/source", graph)
    storage.write_json(f"{folder}/source/source.json", {"num_classes": graph.num_classes})
    config = Config.model_validate({"run_dir": str(folder), "partition": {"num_parts": 3} | partition})
    return write_graph(config, f"{folder}/source", files, f"{folder}/graph", over_here)


@pytest.mark.parametrize("features", ["float16", "int8"])
def test_sparse_features_are_kept_as_float32_only(tmp_path: Path, features: str) -> None:
    with pytest.raises(
        InputError, match=rf"partition\.features: {features} .* sparse .* Set partition\.features: float32"
    ):
        partitioned(tmp_path, with_sparse_features(small_graph()), features=features)
    partitioned(tmp_path, with_sparse_features(small_graph()))


@pytest.mark.parametrize("features", ["float32", "int8"])
def test_every_file_is_handed_back(tmp_path: Path, features: str) -> None:
    files = partitioned(tmp_path, small_graph(), features=features)
    storage.verify(f"{tmp_path}/graph", files)
    assert set(files) == {str(path.relative_to(tmp_path / "graph")) for path in (tmp_path / "graph").rglob("*.*")}
