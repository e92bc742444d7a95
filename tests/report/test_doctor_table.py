"""What the doctor's figures are judged to be, and that hosts which agree share a row."""

import io
from typing import Any

import pytest
from rich.console import Console

from rbm_dist.report.doctor_table import Line, doctor_table, judged

GOOD: dict[str, Any] = {
    "python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "rbm-dist": "0.1.0, code 0123", "torch_cuda": "13.0",
    "gpus": [{"name": "H100", "memory": 80 * 10**9, "driver": "580.1"}] * 2, "cpus": 16, "memory": 64 * 10**9,
    "files": 65536, "free": {"temporary folder": 10**12}, "shared_memory": 32 * 10**9, "clock_s": 0.01,
    "cache_error": None,
    "resources": {"CPU": 16.0, "GPU": 2.0, "object_store_memory": 8e9}, "rates": {"b": 1.2e9},
    "storage": {"error": None, "write": 4e8, "read": 5e8, "held": True, "shared": True},
}  # fmt: skip


def lines(**changes: Any) -> list[Line]:
    """What is not well with a host that differs so from one that is."""
    found = judged({"here": GOOD, "hosts": {"a": GOOD, "b": {**GOOD, **changes}}})
    assert {line.verdict for line in found["a"]} == {"ok"}
    return [line for line in found["b"] if line.verdict != "ok"]


@pytest.mark.parametrize(
    ("changes", "what", "verdict", "said"),
    [
        ({"torch": "2.12.0"}, "torch", "wrong", "what this machine has: 2.13.0"),
        ({"rbm-dist": "0.1.0, code 4567"}, "rbm-dist", "wrong", "code 0123"),
        ({"torch_cuda": None}, "GPUs", "look at", "without CUDA"),
        ({"resources": {"CPU": 16.0}}, "GPUs", "look at", "ray start --num-gpus=2"),
        ({"cpus": 4}, "CPUs", "look at", "ray start --num-cpus=4"),
        ({"shared_memory": 64 << 20}, "/dev/shm", "look at", "--shm-size"),
        ({"free": {"temporary folder": 10**9}}, "temporary folder", "look at", "free some"),
        ({"cache_error": "belongs to another user"}, "cache of remote files", "wrong", ""),
        ({"files": 1024}, "open files", "look at", "ulimit -n"),
        ({"clock_s": -5.0}, "clock", "look at", "chrony"),
        ({"clock_s": 1000.0}, "clock", "wrong", "chrony"),
        ({"rates": {"a": "Connection refused"}}, "network", "wrong", "TCP ports"),
        ({"rates": {"a": 1e7}}, "network", "look at", "cluster.cache_mb"),
        ({"storage": {"error": "PermissionError: no"}}, "run_dir", "wrong", "credentials"),
        ({"storage": {**GOOD["storage"], "shared": False}}, "run_dir", "wrong", "that all hosts share"),
        ({"storage": {**GOOD["storage"], "read": 1e6}}, "run_dir", "look at", "nearer"),
        ({"storage": {**GOOD["storage"], "held": False}}, "one driver", "look at", "no two rbm-dist"),
    ],
)
def test_what_is_not_well_is_named_with_what_to_change(
    changes: dict[str, Any], what: str, verdict: str, said: str
) -> None:
    (line,) = lines(**changes)
    assert (line.what, line.verdict) == (what, verdict)
    assert said in line.advice


def test_a_host_that_does_not_answer() -> None:
    found = judged({"here": GOOD, "hosts": {"a": GOOD, "b": {"silent": "no answer for 60 s"}}})["b"]
    assert [(line.value, line.verdict) for line in found] == [("no answer for 60 s", "wrong")]


def test_hosts_that_agree_share_a_row() -> None:
    out = Console(file=io.StringIO(), width=200)
    out.print(doctor_table(judged({"here": GOOD, "hosts": {name: GOOD for name in "ab"} | {"c": {"silent": "late"}}})))
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("2.60.0") == 1
    assert "a, b" in shown
