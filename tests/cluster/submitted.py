"""A small run that is submitted to the Ray cluster of a bed, what it has written so far, and what must come of it."""

import json
import re
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load, load_file
from threadpoolctl import threadpool_limits

from rbm_dist.config.load import load as load_config
from rbm_dist.graph.store import GraphStore
from rbm_dist.stages import local
from tests.cluster.bed import Bed
from tests.cluster.hosts import ROOT
from tests.patience import patient

CONFIG = str(ROOT / "configs" / "quickstart.yaml")
# Little work, and yet many epochs and checkpoints, so that there is always something to hit.
SMALL = [
    "partition.num_parts=6", "teacher.epochs=30", "teacher.batch_size=64", "student.models=[rbm]",
    "student.epochs=30", "student.pretrain_epochs=8", "student.merge_tolerance=null",
]  # fmt: skip
ON_THREE_HOSTS = [
    "cluster.train_workers=3", "cluster.inference_workers=3", "cluster.shard_servers=3", "cluster.checkpoint_every=1",
    "cluster.max_failures=20", "cluster.memory_store=actor",
]  # fmt: skip
WORKER, SERVER, MEMORY, MAILBOX = "ray::RayTrainWorker", "ray::_ShardServer", "ray::_MemoryActor", "ray::_Mailbox"
PART = "ray::_PartActor"
DRIVER = "-m rbm_dist run"


class Submitted:
    """`launch/submit.sh` at work on the host `store`; its log is kept in a file."""

    def __init__(self, bed: Bed, *overrides: str, run: str | None = None):
        self.bed, self.run = bed, run or uuid.uuid4().hex[:8]
        self._log = bed.folder / f"log-{uuid.uuid4().hex[:8]}"
        command = [str(ROOT / "launch" / "submit.sh"), CONFIG, f"run_dir={self.url}", *SMALL, *ON_THREE_HOSTS]
        with open(self._log, "w") as log:
            self.process = bed.store.popen(
                *command, *overrides, "--address", f"http://{bed.head.address}:8265", stdout=log, stderr=log
            )

    @property
    def url(self) -> str:
        return f"s3://bucket/{self.run}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = patient(60)) -> None:
        """Wait for a moment of the run, which must not end before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"{what}: ended before, with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s:\n{self.log}"
            time.sleep(0.1)

    def wait_for_line(self, text: str) -> None:
        """Until its log has this."""
        self.wait_for(lambda: text in self.log, f"'{text}' in the log", patient(120))

    def wait_for_step(self, loop: str, step: int = 1) -> None:
        """Until a loop (`teacher`, `student/rbm`) has a checkpoint of this step, or a later one."""
        self.wait_for(lambda: self.step(loop) >= step, f"{loop}: checkpoint {step}", patient(90))

    def wait_for_progress(self, loop: str) -> None:
        """Until a loop has another checkpoint than now, or has ended."""
        before = self.checkpoints(loop)
        done = f"✓ {loop.split('/')[0]}:"
        self.wait_for(lambda: self.checkpoints(loop) - before or done in self.log, f"{loop}: progress", patient(60))

    def checkpoints(self, loop: str) -> set[str]:
        found = (re.search(r"checkpoints/(step-[\d.]+)/checkpoint.json", key) for key in self.keys(loop))
        return {each[1] for each in found if each}

    def step(self, loop: str) -> int:
        """The step of a loop's newest checkpoint; 0 without one."""
        return max((int(name.split("-")[1].split(".")[0]) for name in self.checkpoints(loop)), default=0)

    def keys(self, folder: str) -> list[str]:
        return self.bed.keys(f"{self.run}/{folder}/")

    def end(self, timeout: float = patient(120)) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end:\n{self.log}") from None

    def driver(self) -> psutil.Process:
        """The process on the head that carries the run."""
        return next(each for each in self.bed.head.processes(DRIVER) if "python" in each.name())

    def stop(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            for process in [*self.bed.store.processes("submit.py"), *self.bed.head.processes(DRIVER)]:
                process.kill()
            self.process.wait()

    def result(self) -> dict[str, Any]:
        return json.loads(self.bed.read(f"{self.run}/results.json"))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load(self.bed.read(f"{self.run}/{name}/model.safetensors"))


class Undisturbed:
    """The same in one process without Ray, on one thread as Ray's tasks: its figures and weights."""

    def __init__(self, folder: Path, *overrides: str):
        config = load_config(CONFIG, [f"run_dir={folder}", *SMALL, *overrides])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # With more, distances between images are rounded otherwise, and other images are nearest.
        with threadpool_limits(1):
            self.teacher = local.prepare(config, str(folder / "prepared"))
            self.student = local.train(config, str(folder / "prepared"), str(folder / "student"))
        torch.set_num_threads(threads)
        self._folder = folder

    def assert_same(self, submitted: Submitted) -> None:
        """Sums over ranks are rounded in another order; nothing else may differ."""
        self.assert_same_accuracies(submitted)
        self.assert_same_weights(submitted)

    def assert_same_accuracies(self, submitted: Submitted) -> None:
        """Of teacher and student, on validation and test."""
        result = submitted.result()
        for found, expected in ((result["teacher"], self.teacher), (result["students"]["rbm"], self.student)):
            for split in ("val", "test"):
                assert found[split] == pytest.approx(expected[split], abs=1e-3), split

    def assert_same_weights(self, submitted: Submitted) -> None:
        """After some tens of epochs: rounding grows, and in hundreds becomes a share of the weights."""
        self._assert_close(submitted, "teacher", "prepared/teacher", 1e-4)
        self.assert_same_student(submitted)

    def assert_same_student(self, submitted: Submitted) -> None:
        # A row that is as near to two experts may go to the other one.
        self._assert_close(submitted, "student/rbm", "student/rbm", 5e-3)

    def _assert_close(self, submitted: Submitted, name: str, folder: str, atol: float) -> None:
        expected = load_file(self._folder / folder / "model.safetensors")
        for key, tensor in submitted.weights(name).items():
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-3, atol=atol, msg=lambda text, at=f"{name}: {key}": f"{at}: {text}"
            )

    def soft_labels(self) -> np.ndarray:
        """The teacher's probabilities `[N, C]`, in the order of the images."""
        store = GraphStore.open(str(self._folder / "prepared" / "graph"))
        ids = np.arange(store.num_nodes)
        return store.gather("soft", ids)[np.argsort(store.gather("orig_id", ids))]
