"""The stage `partition` in this process: what it refuses, and what a kill at its very end leaves."""

from pathlib import Path

import pytest

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph import shuffle
from rbm_dist.sources.source import SourceGraph
from rbm_dist.sources.staged import write_source
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


def test_cut_off_while_it_tidies_up_it_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = partitioned(tmp_path / "whole", small_graph())

    def cut_off(url: str) -> None:
        assert url.endswith("graph/spill")
        for path in [*Path(url).rglob("*.npy"), *Path(url).glob("chunk-*.json")]:  # in an order of its own
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.files, "remove", cut_off)
        with pytest.raises(KeyboardInterrupt):
            partitioned(tmp_path / "cut", small_graph())
    assert partitioned(tmp_path / "cut", small_graph()) == whole
    assert not (tmp_path / "cut" / "graph" / "spill").exists()


def test_cut_off_and_moved_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = partitioned(tmp_path / "whole", small_graph())
    with monkeypatch.context() as patch:
        patch.setattr(shuffle, "write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            partitioned(tmp_path / "cut", small_graph())
    (tmp_path / "cut").rename(tmp_path / "moved")
    monkeypatch.setattr(shuffle, "_spill", lambda *_: pytest.fail("a chunk was grouped again"))
    assert partitioned(tmp_path / "moved", small_graph()) == whole


@pytest.mark.parametrize("features", ["float32", "int8"])
def test_every_file_is_handed_back(tmp_path: Path, features: str) -> None:
    files = partitioned(tmp_path, small_graph(), features=features)
    storage.verify(f"{tmp_path}/graph", files)
    assert set(files) == {str(path.relative_to(tmp_path / "graph")) for path in (tmp_path / "graph").rglob("*.*")}
