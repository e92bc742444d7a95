"""The results of a run as a table."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

NAMES = {
    "teacher": "teacher (GraphSAGE)",
    "mlp": "MLP (GLNN)",
    "mlp_x2": "MLP × 2",
    "mlp_x4": "MLP × 4",
    "mlp_x8": "MLP × 8",
    "ensemble": "ensemble of MLPs",
    "moe": "vanilla MoE",
    "rbm": "RbM",
}


def results_table(results: dict[str, Any]) -> Group:
    """Accuracy and latency of every model, expert load, and the time each stage took."""
    table = Table(title="Accuracy (epoch chosen on val) and µs per node by batch size (one thread)")
    table.add_column("model")
    models = {"teacher": results["teacher"], **results["students"]}
    splits = [split for split in ("val", "test", "unseen") if split != "unseen" or results["teacher"].get(split)]
    for column in (*splits, "µs @ 1", "µs @ 1,024", "graph-free"):
        table.add_column(column, justify="right")
    for name, figures in models.items():
        latency = results["latency_us"][name]
        table.add_row(
            NAMES.get(name, name),
            *(_percent(figures[split]) for split in splits),
            *(f"{latency[batch]:,.1f}" for batch in ("1", "1024")),
            "no" if name == "teacher" else "yes",
            style="bold" if name == "rbm" else None,
        )
    lines: list[Any] = [table]
    load = results["students"].get("rbm", {}).get("expert_load")
    if load:
        lines.append(Text("share of rows per expert (all layers): " + "  ".join(f"{share:.0%}" for share in load)))
    seconds = results["seconds"]
    spent = "  ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    lines.append(Text(f"seconds per stage: {spent}  (total {sum(seconds.values()):.1f})"))
    return Group(*lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
