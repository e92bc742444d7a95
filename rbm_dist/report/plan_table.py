"""A plan as a person reads it: a row per stage, the processes at the peak, what would not fit, and what is advised."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def plan_table(plan: dict[str, Any]) -> Group:
    """The plan that `rbm-dist plan --json` writes, as a table and some lines."""
    facts, hosts = plan["facts"], plan["hosts"]
    kind = "dense" if facts["nonzeros"] is None else "sparse"
    note = f" ({facts['note']})" if facts["note"] else ""
    table = Table(title="What each stage would take (estimates; time is rough)")
    table.add_column("stage")
    for column in ("disk written", "kept", "memory per host", "mapped", "network", "time"):
        table.add_column(column, justify="right")
    processes = Table(title="Processes of a host, where a stage takes most memory")
    processes.add_column("stage")
    processes.add_column("processes")
    for column in ("base", "held", "all together"):
        processes.add_column(column, justify="right")
    for stage in plan["stages"]:
        style = None if stage["memory"] <= hosts["memory"] else "red"
        table.add_row(
            stage["name"],
            *(size(stage[name]) for name in ("written", "kept", "memory", "mapped", "network")),
            duration(stage["seconds"]),
            style=style,
        )
        for index, each in enumerate(each for each in stage["processes"] if each["count"]):
            together = each["count"] * (each["base"] + each["held"])
            processes.add_row(
                "" if index else stage["name"], f"{each['count']} × {each['kind']}",
                *(size(count) for count in (each["base"], each["held"], together)),
                style=style,
            )  # fmt: skip
    lines: list[Any] = [
        Text(
            f"graph: {facts['num_nodes']:,} nodes, {facts['num_edges']:,} directed edges at most, "
            f"{facts['num_features']:,} {kind} features, {facts['num_classes']:,} classes, "
            f"{facts['num_train']:,} training nodes{note}"
        ),
        Text(f"hosts: {hosts['count']} × {size(hosts['memory'])}, {hosts['cores']} cores, {hosts['gpus']} GPUs"),
        table,
        processes,
        Text(
            f"disk at the peak {size(plan['disk'])}, time {duration(sum(each['seconds'] for each in plan['stages']))}; "
            "memory is base + held of each process, mapped files are given back when memory is short"
        ),
    ]
    if plan["cached"] is not None:
        lines.append(
            Text(f"cache of run_dir on each host: {size(plan['cached'])} at the peak, may have {size(hosts['cache'])}")
        )
    wanted = plan["hosts_wanted"]
    advised = f"{wanted} such host{'s' * (wanted > 1)}" if wanted else "larger hosts or another configuration"
    lines.append(
        Text(
            f"advised: partition.num_parts: {plan['parts']} or more, {advised}, up to {plan['workers']} workers "
            "(cluster.train_workers, cluster.inference_workers)"
        )
    )
    lines += [Text(f"does not fit: {problem}", style="bold red") for problem in plan["problems"]]
    if not plan["problems"]:
        lines.append(Text("it fits", style="green"))
    return Group(*lines)


def size(count: float) -> str:
    """Bytes for people, to two digits or more."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:,.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people."""
    for limit, unit, length in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            value = seconds / length
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
    return f"{seconds / 86400:,.0f} days"
