"""Runs that are killed, and what the same command makes of them."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.curves import computed
from tests.patience import patient
from tests.stages.conftest import ROOT, SHORT, command, rbm_dist

QUICKSTART = "configs/quickstart.yaml"
ROUTED = 26  # epochs of routed training in a short run


def figures(run: Path) -> dict[str, Any]:
    """The results, without what is measured in time."""
    results = json.loads((run / "results.json").read_text())
    return {key: results[key] for key in ("teacher", "students")}


def start(run: Path) -> subprocess.Popen[bytes]:
    arguments = command("run", QUICKSTART, f"run_dir={run}", *SHORT)
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a moment in a run."""
    deadline = time.monotonic() + patient(180)
    while not condition():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)


def kill_when(condition: Callable[[], bool], run: Path) -> None:
    """Start a run, SIGKILL its driver as soon as the condition holds, and see that its cluster ends with it."""
    process = start(run)
    wait_for(condition, process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) > 3
    process.kill()
    process.communicate()
    # Ray's agents, which do no work, take up to two minutes to notice.
    _, alive = psutil.wait_procs([each for each in below if "Agent" not in name_of(each)], timeout=patient(30))
    assert not alive


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def rows_of(run: Path, loop: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["loop"] == loop]


def newest(folder: Path) -> int:
    """The epochs that a loop's newest checkpoint holds; 0 without one."""
    epochs = [0]
    for path in folder.glob("step-*/checkpoint.json"):
        with contextlib.suppress(FileNotFoundError):  # deleted since, as newer ones are there
            epochs.append(json.loads(path.read_text())["facts"]["epochs"])
    return max(epochs)


@pytest.mark.slow
@pytest.mark.timeout(patient(600))
def test_killed_in_every_stage_the_result_is_the_same(finished_run: Path, tmp_path: Path) -> None:
    """Then, in the last attempt, a training worker is killed too: it is replaced within the run."""
    run = tmp_path / "run"
    routed = run / "student" / "rbm" / "checkpoints"
    moments: dict[str, Callable[[], bool]] = {
        "partition": (run / "graph" / "part-00000" / "indptr.npy").exists,
        "teacher": lambda: newest(run / "teacher" / "checkpoints") >= 3,
        "soft_labels": (run / "graph" / "part-00000" / "soft.npy").exists,
        "student": lambda: newest(routed) >= 2,
    }
    for moment in moments.values():
        kill_when(moment, run)
    process, before = start(run), newest(routed)
    assert before < ROUTED - 4
    wait_for(lambda: newest(routed) > before + 1, process)
    below = psutil.Process(process.pid).children(recursive=True)
    workers = [each for each in below if "RayTrainWorker" in " ".join(each.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    _, stderr = process.communicate(timeout=patient(200))
    assert process.returncode == 0, stderr.decode()
    assert figures(run) == figures(finished_run)
    assert not list(run.rglob("*.tmp-*"))
    for loop in ("teacher", "mlp", "rbm/pretrain", "rbm"):
        found, expected = ([computed(row) for row in rows_of(each, loop)] for each in (run, finished_run))
        assert found == expected, "each epoch stands there once, to the last digit"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4])  # one, two and three: test_student_exact.py
def test_the_student_goes_on_with_another_number_of_workers(finished_run: Path, tmp_path: Path, workers: int) -> None:
    """From checkpoints that two workers wrote, with the experts sharded over them."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "evaluate")
    (run / "student" / "manifest.json").unlink()
    for path in (run / "student" / "rbm").glob("model.*"):
        path.unlink()
    shutil.rmtree(max((run / "student" / "rbm" / "checkpoints").iterdir()))
    layout = [f"cluster.train_workers={workers}", f"cluster.expert_parallel={workers}"]
    done = rbm_dist("student", QUICKSTART, f"run_dir={run}", *SHORT, *layout)
    assert done.returncode == 0, done.stderr
    assert "went on from where it was" in done.stdout
    found, expected = (load_file(each / "student" / "rbm" / "model.safetensors") for each in (run, finished_run))
    for name, tensor in found.items():
        # Sums are rounded in another order.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    losses, expected_losses = ([row["loss"] for row in rows_of(each, "rbm")] for each in (run, finished_run))
    assert losses == pytest.approx(expected_losses, rel=1e-4), "the same curve"


def test_an_interrupt_ends_the_run_and_its_cluster(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "student")
    process = start(run)
    wait_for(lambda: newest(run / "student" / "mlp" / "checkpoints") >= 1, process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=patient(60))
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert b"run the same command again to go on" in stderr
    _, alive = psutil.wait_procs([each for each in below if "Agent" not in name_of(each)], timeout=patient(30))
    assert not alive
