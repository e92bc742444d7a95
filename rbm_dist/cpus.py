"""How many CPUs this process may use: those of its affinity, within the quotas of its container.

`os.cpu_count` is the machine's: so many threads, in a container with a quota of a few CPUs, mostly stand still.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: str = "/") -> int:
    """CPUs that this process may use at once, at least 1. root: where the system's `proc` and `sys` are."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas(Path(root)))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that the cgroup of this process and those above it may use; none without a quota."""
    mounted = root / "sys/fs/cgroup"
    for folder in _folders(root, mounted):
        # Version 2: "QUOTA PERIOD" in one file; version 1: a file for each. Without a quota: "max", -1.
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            yield int(words[0]) / int(words[1])


def _folders(root: Path, mounted: Path) -> Iterator[Path]:
    """The folders of this process's cgroups that may set quotas, and of all above them."""
    yield from (mounted, mounted / "cpu")  # what a container sees as its own, whatever /proc says it is called outside
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or "cpu" in controllers.split(","):
            own = Path(path.lstrip("/"))
            yield from (mounted / controllers / folder for folder in (own, *own.parents))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
