"""CPUs that may be used: the affinity for real, quotas from trees as systems show them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbm_dist.cpus import usable_cpus

_PRINT = "from rbm_dist.cpus import usable_cpus; print(usable_cpus())"


def test_an_affinity_counts() -> None:
    one = min(os.sched_getaffinity(0))
    bound = f"import os; os.sched_setaffinity(0, {{{one}}}); {_PRINT}"
    assert int(subprocess.check_output([sys.executable, "-c", bound])) == 1
    assert int(subprocess.check_output(["taskset", "-c", str(one), sys.executable, "-c", _PRINT])) == 1
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}, 8),  # as in a container
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        (  # a service without a quota in a slice that has one
            {
                "proc/self/cgroup": "0::/batch.slice/job.service\n",
                "sys/fs/cgroup/batch.slice/job.service/cpu.max": "max 100000\n",
                "sys/fs/cgroup/batch.slice/cpu.max": "600000 100000\n",
            },
            6,
        ),
        (  # version 1, the cgroup's own path
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/ab\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (  # version 1 in a container, which sees its own folder as the top
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/kubepods/pod1/c\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
    ],
)
def test_the_smallest_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(str(tmp_path)) == expected
