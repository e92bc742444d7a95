"""Dry runs: what they say of stages and hosts, and that they leave nothing behind."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.config.run import ClusterConfig
from rbm_dist.stages.dry_run import dealt, missing
from tests.stages.conftest import SHORT, rbm_dist


@given(st.integers(0, 40), st.lists(st.integers(0, 9), max_size=8))
def test_workers_are_dealt_where_there_is_room(workers: int, room: list[int]) -> None:
    spread, packed = dealt(workers, room, pack=False), dealt(workers, room, pack=True)
    for share in (spread, packed):
        assert sum(share) == min(workers, sum(room))
        assert all(each <= most for each, most in zip(share, room, strict=True))
    not_full = [each for each, most in zip(spread, room, strict=True) if each < most]
    assert all(each <= min(not_full) + 1 for each in spread if not_full), "evenly"
    used = sum(each > 0 for each in packed)
    assert sum(sorted(room, reverse=True)[: max(0, used - 1)]) < max(1, sum(packed)), "no host more than must be"


def test_a_group_that_may_be_smaller_needs_less_room() -> None:
    assert missing(ClusterConfig(train_workers=(1, 4), inference_workers=1), 1) == []
    training, inference = missing(ClusterConfig(train_workers=(2, 4), inference_workers=3, use_gpu=True), 1)
    assert training.startswith("cluster.train_workers: 2 need a CPU and a GPU each, and there is room for 1")
    assert inference.startswith("cluster.inference_workers: 3 need")


def test_a_run_that_is_new_here_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    done = rbm_dist("run", "configs/quickstart.yaml", f"run_dir={tmp_path}/run", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": to do\n") == 6
    assert "this machine" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_done_is_told_and_refused_as_the_run_would_be(finished_run: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished_run.rglob("*"))
    arguments = ["configs/quickstart.yaml", f"run_dir={finished_run}", *SHORT, "--dry-run"]
    done = rbm_dist("run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done before\n") == 7
    done = rbm_dist("run", *arguments, "teacher.hidden=3")
    assert done.returncode == 2
    assert "teacher.hidden: 128 there, 3 now" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in finished_run.rglob("*")) == before
