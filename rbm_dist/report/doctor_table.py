"""What `rbm-dist doctor` found, judged line by line: ok, to look at, or wrong, and then what to change."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from rbm_dist.report.plan_table import size

Facts = dict[str, Any]
Verdict = Literal["ok", "look at", "wrong"]
OK: Verdict = "ok"
LOOK: Verdict = "look at"
WRONG: Verdict = "wrong"
_STYLES = {OK: "green", LOOK: "yellow", WRONG: "bold red"}

_VERSIONS = ("python", "torch", "ray", "rbm-dist")
_FREE = 10 * 10**9  # bytes of a disk below which it is looked at
_SLOW_NETWORK, _SLOW_STORAGE = 100e6, 20e6  # bytes per second
_FEW_FILES = 4096
_CLOCK_S, _CLOCK_WRONG_S = 2.0, 300.0  # S3 refuses requests beyond a quarter of an hour


class Line(NamedTuple):
    """One thing of one host."""

    what: str
    value: str
    verdict: Verdict
    advice: str = ""


def judged(found: Facts) -> dict[str, list[Line]]:
    """The lines of every host, of what `runtime.doctor.examine` gives."""
    here, hosts = found["here"], found["hosts"]
    return {name: list(_of_host(facts, here, several=len(hosts) > 1)) for name, facts in hosts.items()}


def doctor_table(lines: dict[str, list[Line]]) -> Table:
    """Lines that hosts have in common are one row."""
    rows: dict[Line, list[str]] = {}
    for name, each in lines.items():
        for line in each:
            rows.setdefault(line, []).append(name)
    order = list(dict.fromkeys(line.what for line in rows))
    table = Table()
    for column in ("", "", "hosts", "verdict", "what to change"):
        table.add_column(column)
    for line in sorted(rows, key=lambda line: order.index(line.what)):
        names = rows[line]
        which = "all" if len(names) == len(lines) > 1 else ", ".join(names)
        table.add_row(line.what, Text(line.value), Text(which), Text(line.verdict, _STYLES[line.verdict]), line.advice)
    return table


def _of_host(facts: Facts, here: Facts, several: bool) -> Iterator[Line]:
    if "silent" in facts:
        yield Line(
            "host", facts["silent"], WRONG, "see that rbm-dist is installed there, and that Ray is well (ray status)"
        )
        return
    for name in _VERSIONS:
        same = facts[name] == here[name]
        advice = f"install what this machine has: {here[name]}"
        yield Line(name, facts[name], OK if same else WRONG, "" if same else advice)
    yield _gpus(facts)
    resources = facts.get("resources", {})  # of its Ray node
    given = resources.get("CPU", 0)
    many = given > facts["cpus"]
    text = f"{facts['cpus']} to use" + (f", Ray has {given:g}" if resources else "")
    yield Line("CPUs", text, LOOK if many else OK, f"ray start --num-cpus={facts['cpus']}" if many else "")
    yield Line("memory", f"{size(facts['memory'])} available", OK)
    yield from _disks(facts, resources.get("object_store_memory"))
    few = facts["files"] < _FEW_FILES
    yield Line("open files", f"{facts['files']:,} at most", LOOK if few else OK, "ulimit -n 65536" if few else "")
    if facts.get("clock_s") is not None:
        yield _clock(facts["clock_s"])
    yield from _network(facts.get("rates", {}))
    if "storage" in facts:
        yield from _storage(facts["storage"], several)


def _gpus(facts: Facts) -> Line:
    gpus = facts["gpus"]
    if not gpus:
        return Line("GPUs", "none", OK)
    kinds = {f"{gpu['name']}, {size(gpu['memory'])}, driver {gpu['driver']}" for gpu in gpus}
    value = f"{len(gpus)} × {'; '.join(sorted(kinds))}"
    if facts["torch_cuda"] is None:
        return Line("GPUs", value, LOOK, "torch is built without CUDA: install one with, for cluster.use_gpu")
    resources = facts.get("resources", {"GPU": len(gpus)})
    given = resources.get("GPU", 0)
    if given < len(gpus):
        return Line("GPUs", f"{value}; Ray has {given:g}", LOOK, f"ray start --num-gpus={len(gpus)}")
    return Line("GPUs", value, OK)


def _disks(facts: Facts, object_store: float | None) -> Iterator[Line]:
    for name, free in facts["free"].items():
        full = free < _FREE
        yield Line(name, f"{size(free)} free", LOOK if full else OK, "free some of the disk" if full else "")
    if facts["cache_error"]:
        yield Line("cache of remote files", facts["cache_error"], WRONG)
    small = facts["shared_memory"] < (object_store or 0)
    text = size(facts["shared_memory"]) + (f"; Ray's object store: {size(object_store)}" if object_store else "")
    advice = "a larger /dev/shm (docker run --shm-size, an emptyDir of medium Memory)" if small else ""
    yield Line("/dev/shm", text, LOOK if small else OK, advice)


def _clock(ahead_s: float) -> Line:
    far = abs(ahead_s)
    if far < _CLOCK_S:
        return Line("clock", f"within {_CLOCK_S:g} s of ours", OK)
    value = f"{far:,.1f} s {'ahead of' if ahead_s > 0 else 'behind'} ours"
    return Line("clock", value, WRONG if far > _CLOCK_WRONG_S else LOOK, "synchronise it (chrony, NTP)")


def _network(rates: dict[str, float | str]) -> Iterator[Line]:
    measured = [rate for rate in rates.values() if not isinstance(rate, str)]
    for other, why in rates.items():
        if isinstance(why, str):
            advice = "let all TCP ports through between the hosts, on the addresses that Ray knows them by"
            yield Line("network", f"to {other}: {why}", WRONG, advice)
    if measured:
        slow = min(measured) < _SLOW_NETWORK
        value = f"{size(min(measured))}/s or more to {len(measured)} other host(s)"
        advice = "exchanges will be slow: bring the hosts nearer to each other, set cluster.cache_mb" if slow else ""
        yield Line("network", value, LOOK if slow else OK, advice)


def _storage(facts: Facts, several: bool) -> Iterator[Line]:
    if facts["error"]:
        yield Line(
            "run_dir", facts["error"], WRONG, "another run_dir, or the rights and credentials for it on this host"
        )
        return
    if several and not facts["shared"]:
        yield Line(
            "run_dir", "the driver's files are not seen", WRONG, "a folder that all hosts share, or s3://, gs://"
        )
    slow = min(facts["write"], facts["read"]) < _SLOW_STORAGE
    value = f"writes {size(facts['write'])}/s, reads {size(facts['read'])}/s"
    yield Line("run_dir", value, LOOK if slow else OK, "storage nearer to the hosts" if slow else "")
    if facts["held"] is False:
        yield Line("one driver", "no conditional writes", LOOK, "see to it that no two rbm-dist work in one run_dir")
