"""What a process imports before its first task: where many small tasks share few cores, that is most of their time."""

import subprocess
import sys

import pytest

_SLOW = ("torch", "ray.train", "pandas", "sklearn", "torch_geometric")


@pytest.mark.parametrize(
    ("worker", "allowed"),
    [
        ("rbm_dist.stages.source", ()),
        ("rbm_dist.stages.partition", ()),
        ("rbm_dist.stages.encodings", ()),
        ("rbm_dist.runtime.tasks", ()),
        ("rbm_dist.runtime.shard_servers", ()),
        ("rbm_dist.runtime.mailbox", ()),
        ("rbm_dist.stages.soft_labels", ("torch",)),
        ("rbm_dist.stages.evaluate", ("torch",)),
        ("rbm_dist.stages.student", ("torch",)),
    ],
)
def test_a_worker_imports_nothing_slow_that_it_does_not_need(worker: str, allowed: tuple[str, ...]) -> None:
    slow = [name for name in _SLOW if name not in allowed]
    code = f"import sys, {worker}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
