"""Runs that are killed, and what the same command makes of them."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.stages.conftest import ROOT, SHORT, command, rbm_dist

QUICKSTART = "configs/quickstart.yaml"


def figures(run: Path) -> dict[str, Any]:
    """The results, without what is measured in time."""
    results = json.loads((run / "results.json").read_text())
    return {key: results[key] for key in ("teacher", "students")}


def start(run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    arguments = command("run", QUICKSTART, f"run_dir={run}", *SHORT, *overrides)
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_when(condition: Callable[[], bool], run: Path, *overrides: str) -> None:
    """Start a run and SIGKILL it as soon as the condition holds."""
    process = start(run, *overrides)
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.01)
    process.kill()
    process.communicate()


def workers_below(pid: int) -> list[psutil.Process]:
    """The training workers that belong to a driver."""
    below = psutil.Process(pid).children(recursive=True)
    return [each for each in below if "RayTrainWorker" in " ".join(each.cmdline())]


# In each stage, at the first sign that it is at work.
MOMENTS = [
    "source/config.json", "graph/part-00000/indptr.npy", "teacher/checkpoints/step-00000003/checkpoint.json",
    "soft_labels/config.json", "student/mlp/checkpoints/step-00000004/checkpoint.json",
    "student/rbm/pretrain/step-00000002/checkpoint.json", "student/rbm/checkpoints/step-00000002/checkpoint.json",
    "evaluate/config.json",
]  # fmt: skip


@pytest.mark.timeout(600)
def test_killed_in_every_stage_the_result_is_the_same(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for moment in MOMENTS:
        kill_when((run / moment).exists, run)
    done = rbm_dist("run", QUICKSTART, f"run_dir={run}", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "source: done before" in done.stdout
    assert figures(run) == figures(finished_run)
    assert not list(run.rglob("*.tmp-*"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["loop"] == "rbm"] == list(range(6)), "each epoch stands there once"


@pytest.mark.timeout(400)
def test_the_student_goes_on_with_other_numbers_of_workers(finished_run: Path, tmp_path: Path) -> None:
    """Killed on two workers with sharded experts, gone on with on four, killed, finished on one."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for folder in ("student", "evaluate"):
        shutil.rmtree(run / folder)
    checkpoints = run / "student" / "rbm" / "checkpoints"
    kill_when((checkpoints / "step-00000002" / "checkpoint.json").exists, run)
    kill_when((checkpoints / "step-00000004" / "checkpoint.json").exists, run, "cluster.train_workers=4")
    done = rbm_dist("run", QUICKSTART, f"run_dir={run}", *SHORT, "cluster.train_workers=1")
    assert done.returncode == 0, done.stderr
    found, expected = figures(run)["students"]["rbm"], figures(finished_run)["students"]["rbm"]
    # Sums are rounded in another order, so a few borderline nodes may change sides.
    for name in ("val", "test"):
        assert found[name] == pytest.approx(expected[name], abs=0.005)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    losses, expected_losses = ([row["loss"] for row in each if row["loop"] == "rbm"] for each in (rows, reference))
    assert losses == pytest.approx(expected_losses, rel=1e-3), "the same curve"


@pytest.mark.timeout(300)
def test_a_lost_worker_is_replaced_within_the_run(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for folder in ("student", "evaluate"):
        shutil.rmtree(run / folder)
    process = start(run)
    while not (run / "student" / "rbm" / "pretrain" / "step-00000002" / "checkpoint.json").exists():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.01)
    victims = workers_below(process.pid)
    assert len(victims) == 2
    os.kill(victims[1].pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr.decode()
    assert figures(run) == figures(finished_run)


def test_no_process_outlives_a_killed_run(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    while not (tmp_path / "run" / "graph" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) > 3
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
