"""A short real run on a local Ray cluster, shared by the tests that look at a finished run directory."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from threadpoolctl import threadpool_limits

from tests.patience import patient

ROOT = Path(__file__).parents[2]
SHORT = [
    "partition.num_parts=4", "teacher.epochs=6", "student.epochs=30", "student.pretrain_epochs=4",
    "cluster.checkpoint_every=1", "cluster.expert_parallel=2", f"cluster.silence_timeout_s={patient(300)}",
    "source.unseen_share=0.1",
    "encodings.positional=fastrp", "encodings.label_propagation=true", "student.inputs=[feat, pos, prop]",
    "soft_labels.smooth.method=correct_and_smooth", "soft_labels.smooth.steps=3",
    "student.routing=layers", "student.top_k=3", "student.merge_tolerance=null",
]  # fmt: skip

Command = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str) -> list[str]:
    """`rbm-dist` in a process of its own, as a user starts it."""
    return [sys.executable, "-m", "rbm_dist", *arguments]


def rbm_dist(*arguments: str, timeout: float = patient(240)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def kill_once(reached: Callable[[], bool], *arguments: str) -> None:
    """Start `rbm-dist` and kill it with all of its processes once it got so far."""
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + patient(120)
    while not reached():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for each in below:  # at once, where Ray itself would take seconds to notice
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(below, timeout=patient(30))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """In every library, as runs of experiments and searches: sums over other numbers of threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart with few epochs, all stages and unseen nodes. Tests must not change it: copy it first."""
    url = tmp_path_factory.mktemp("finished") / "run"
    done = rbm_dist("run", "configs/quickstart.yaml", f"run_dir={url}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    (url.parent / "stdout").write_text(done.stdout)
    return url


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run, free to be damaged. Its manifests hold no absolute paths."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
