"""The stage: the same arrays as in one process, its place among the stages, and what a reset leaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rbm_dist import storage
from rbm_dist.config import ClusterConfig, Config
from rbm_dist.errors import InputError
from rbm_dist.graph.encodings import encode_in_process
from rbm_dist.graph.store import GraphStore
from rbm_dist.runtime.cluster import ray_cluster
from rbm_dist.stages import run as run_
from rbm_dist.stages.encodings import reset_encodings, run_encodings
from rbm_dist.stages.pipeline import STAGES, stages_of
from rbm_dist.stages.run import Run
from tests.small_graph import small_store

ENCODINGS = {"positional": "fastrp", "hops": 2, "label_propagation": True, "iterations": 2}


class Silent:
    """A reporter to nobody."""

    def add(self, *_: Any) -> None: ...


def config(url: str, **encodings: Any) -> Config:
    return Config.model_validate({"run_dir": url, "encodings": encodings})


@pytest.fixture
def cluster() -> Iterator[None]:
    """Ray; that of the tests before, where they left it."""
    if ray.is_initialized():
        yield
    else:
        with ray_cluster(ClusterConfig(), None):
            yield


def test_the_same_as_in_one_process(cluster: None, tmp_path: Path) -> None:
    url = f"{tmp_path}/run"
    small_store(url)
    run = Run(config(url, **ENCODINGS), url, Silent())  # type: ignore[arg-type]
    files = run_encodings(run)
    assert set(files) == {f"graph/part-{part:05d}/{name}.npy" for part in range(4) for name in ("pos", "prop")}
    storage.verify(url, files)
    alone = small_store(f"{tmp_path}/alone")
    encode_in_process(alone, run.config.encodings, run.config.seed)
    store = GraphStore.open(run.graph_url)
    for name in ("pos", "prop"):
        np.testing.assert_array_equal(store.gather(name, np.arange(240)), alone.gather(name, np.arange(240)))


def test_reset_removes_what_the_stage_added_and_no_more(tmp_path: Path) -> None:
    url = str(tmp_path)
    store = small_store(url)
    before = sorted(tmp_path.rglob("*"))
    encode_in_process(store, config(url, **ENCODINGS).encodings, 0)
    # Unfinished, in one part only, and not the first.
    store.write_part("prop_step2", 2, np.dtype(np.float32), (1,), [np.zeros((len(store.ids(2)), 1))])
    assert sorted(tmp_path.rglob("*")) != before
    reset_encodings(url)
    assert sorted(tmp_path.rglob("*")) == before
    reset_encodings(f"{url}/nothing")


def test_the_stage_shows_where_it_is_configured(tmp_path: Path) -> None:
    names = [stage.name for stage in STAGES]
    assert names.index("soft_labels") + 1 == names.index("encodings") == names.index("student") - 1
    assert [stage.name for stage in stages_of(config("x"))] == [name for name in names if name != "encodings"]
    for encodings in ({"positional": "deepwalk"}, {"label_propagation": True}):
        assert stages_of(config("x", **encodings)) == STAGES


@pytest.mark.parametrize(
    ("then", "now", "kept"),
    [
        ({}, ENCODINGS, ["source", "partition", "teacher", "soft_labels"]),
        (ENCODINGS, {}, ["source", "partition", "teacher", "soft_labels"]),
        (ENCODINGS, ENCODINGS | {"iterations": 4}, ["source", "partition", "teacher", "soft_labels"]),
    ],
    ids=["wanted now", "not wanted any more", "others"],
)
def test_other_encodings_are_refused_or_replace_what_came_of_them(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any], kept: list[str]
) -> None:
    url = str(tmp_path)
    for stage in stages_of(config(url, **then)):
        run_.begin(stage, config(url, **then), url, None)
    run_.refuse_other_configuration(STAGES, config(url, **then), url)
    with pytest.raises(InputError, match=r"  encodings\.\w+: .* there, .* now"):
        run_.refuse_other_configuration(STAGES, config(url, **now), url)
    run_.discard_other_configuration(STAGES, config(url, **now), url)
    run_.refuse_other_configuration(STAGES, config(url, **now), url)
    assert [stage.name for stage in STAGES if (tmp_path / stage.folder / "config.json").exists()] == kept
