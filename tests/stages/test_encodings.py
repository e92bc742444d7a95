"""The stage: the same arrays as in one process, its place among the stages, and what a reset leaves."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.encodings import encode_in_process
from rbm_dist.graph.store import GraphStore
from rbm_dist.stages import run as run_
from rbm_dist.stages.encodings import reset_encodings
from rbm_dist.stages.pipeline import STAGES, stages_of
from tests.small_graph import small_store

ENCODINGS = {"positional": "fastrp", "hops": 2, "label_propagation": True, "iterations": 2}


def config(url: str, **encodings: Any) -> Config:
    return Config.model_validate({"run_dir": url, "encodings": encodings})


def test_the_same_as_in_one_process(finished_run: Path, tmp_path: Path) -> None:
    """What the run's tasks wrote, some parts each, against one loop over all."""
    shutil.copytree(finished_run / "graph", tmp_path / "graph")
    reset_encodings(str(tmp_path))
    written, alone = GraphStore.open(f"{finished_run}/graph"), GraphStore.open(f"{tmp_path}/graph")
    config = Config.model_validate_json((finished_run / "config.json").read_text())
    with pytest.raises(InputError, match="pos"):
        alone.array("pos", 0)
    encode_in_process(alone, config.encodings, config.seed)
    ids = np.arange(written.num_nodes)
    for name in ("pos", "prop"):
        np.testing.assert_array_equal(written.gather(name, ids), alone.gather(name, ids))


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
