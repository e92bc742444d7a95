"""The stage `partition` in this process: what it refuses, and what a kill at its very end leaves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph import csc, shuffle
from rbm_dist.sources.source import SourceGraph
from rbm_dist.sources.staged import feat_piece, write_source
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.run import Files
from rbm_dist.stages.source import Arguments, over_here
from tests.small_graph import small_graph, with_sparse_features
from tests.storage.proxy import FaultyProxy


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


def test_tasks_fetch_their_own_rows_and_the_driver_next_to_nothing(
    network: FaultyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a source on object storage whose features are in many pieces."""
    monkeypatch.setattr(shuffle, "_CHUNK_ROWS", 5000)
    num_nodes, width, url = 20_000, 48, f"{s3_url}/source"
    rng = np.random.default_rng(0)
    graph = replace(
        small_graph(),
        csc=csc.build(*rng.integers(0, num_nodes, (2, 60_000)), num_nodes, undirected=True),
        label=np.zeros(num_nodes, np.int64), split=np.zeros(num_nodes, np.int8), num_features=width,
        feat_chunks=lambda: iter([np.zeros((num_nodes, width), np.float32)]),
    )  # fmt: skip
    files = write_source(url, graph)
    for piece, rows in enumerate(np.array_split(next(iter(graph.feat_chunks())), 8)):
        files[feat_piece(piece)] = storage.write_array(f"{url}/{feat_piece(piece)}", rows)
    ends = [2500 * (piece + 1) for piece in range(8)]
    storage.write_json(f"{url}/source.json", {"num_classes": 1, "feat_ends": ends})
    config = Config.model_validate({"run_dir": s3_url, "partition": {"num_parts": 3, "method": "random"}})
    spent: dict[str, list[int]] = {}

    def over(unit: str, function: Callable[..., Any], arguments: Arguments) -> list[Any]:
        results, spent[unit] = [], []
        for each in arguments:
            before = network.bytes
            results.append(function(*each))
            spent[unit].append(network.bytes - before)
        return results

    before = network.bytes
    written = write_graph(config, url, files, f"{s3_url}/graph", over)
    in_driver = network.bytes - before - sum(map(sum, spent.values()))
    answers = 30_000  # lines of HTTP, and the headers of arrays
    assert in_driver < 3 * answers, "of which half are spill files' listing and deletion"
    assert spent["assignment"][0] < sum(files[f"{name}.npy"]["bytes"] for name in ("indptr", "indices")) + answers
    per_row = sum(files[f"{name}.npy"]["bytes"] for name in ("indptr", "label", "split", "orig_id")) / num_nodes
    edges = np.diff(graph.csc.indptr[::5000]) * graph.csc.indices.itemsize
    first, *others = spent["chunks"]
    assert len(others) == 3
    for bytes_, of_edges in zip((first - 4 * num_nodes, *others), edges, strict=True):  # the first fetches `new_id`
        slices = 5000 * (4 * width + per_row + 4) + of_edges
        assert slices < bytes_ < slices + answers
    for part, bytes_ in enumerate(spent["parts"]):
        sizes = [info["bytes"] for name, info in written.items() if name.startswith(f"part-{part:05d}/")]
        assert bytes_ < sum(sizes) + 2 * answers
