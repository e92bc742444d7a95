"""The rule by which a stage is skipped, gone on with, or started."""

from pathlib import Path

import pytest

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.stages import run as run_
from rbm_dist.stages.run import Stage

STAGE = Stage("partition", "graph", ("partition",), lambda run: {})


def test_what_a_kill_leaves_of_a_stage_that_was_cleared_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_.begin(STAGE, Config(run_dir=str(tmp_path)), str(tmp_path), None)
    storage.write_json(f"{tmp_path}/graph/spill/chunk-00000.json", {})
    assert run_.state(STAGE, str(tmp_path), None) == "started"
    real = storage.remove

    def cut_off(url: str) -> None:
        if url.endswith("/graph"):
            raise KeyboardInterrupt
        real(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_.clear(STAGE, str(tmp_path))
    assert (tmp_path / "graph" / "spill" / "chunk-00000.json").exists()
    assert run_.state(STAGE, str(tmp_path), None) == "new"
