"""The results of a run as a table."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

NAMES = {
    "majority": "majority class",
    "regression": "logistic regression",
    "teacher": "teacher (GraphSAGE)",
    "mlp": "MLP (GLNN)",
    "mlp_x2": "MLP × 2",
    "mlp_x4": "MLP × 4",
    "mlp_x8": "MLP × 8",
    "ensemble": "ensemble of MLPs",
    "moe": "vanilla MoE",
    "rbm": "RbM",
}

_NO_BETTER = (
    "On validation the teacher is no better than the baseline '{}': students have little to learn from it. "
    "Its features may have a scale that it cannot learn from (source.normalize, teacher.norm, teacher.weight_decay), "
    "its training may be too short (teacher.epochs, teacher.lr), or edges mostly join nodes of different classes, "
    "which GraphSAGE averages away: then the baseline is the better choice."
)

_EXPERTS = 16  # whose shares are shown


def results_table(results: dict[str, Any]) -> Group:
    """Accuracy and latency of every model, expert load, and the time each stage took."""
    table = Table(title="Accuracy (epoch chosen on val) and µs per node by batch size (one thread)")
    table.add_column("model")
    baselines = results.get("baselines", {})  # a run of an earlier version has none
    models = {**baselines, "teacher": results["teacher"], **results["students"]}
    splits = [split for split in ("val", "test", "unseen") if split != "unseen" or results["teacher"].get(split)]
    for column in (*splits, "µs @ 1", "µs @ 1,024", "graph-free"):
        table.add_column(column, justify="right")
    for name, figures in models.items():
        latency = results["latency_us"].get(name)
        table.add_row(
            NAMES.get(name, name),
            *(_percent(figures[split]) for split in splits),
            *(f"{latency[batch]:,.1f}" if latency else "–" for batch in ("1", "1024")),
            "no" if name == "teacher" else "yes",
            style="bold" if name == "rbm" else None,
        )
    lines: list[Any] = [table]
    best = max(baselines, key=lambda name: baselines[name]["val"], default=None)
    if best and results["teacher"]["val"] <= baselines[best]["val"]:
        lines.append(Text(_NO_BETTER.format(NAMES[best])))
    for index, load in enumerate(results["students"].get("rbm", {}).get("expert_load_per_layer", [])):
        unused = [str(expert) for expert, share in enumerate(load) if not share]
        without = f"; without any: {', '.join(unused)}" if unused else ""
        lines.append(Text(f"share of rows per expert, layer {index}: {_shares(load)}{without}"))
    seconds = results["seconds"]
    spent = "  ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    lines.append(Text(f"seconds per stage: {spent}  (total {sum(seconds.values()):.1f})"))
    return Group(*lines)


def _shares(load: list[float]) -> str:
    shown = "  ".join(f"{share:.0%}" for share in load[:_EXPERTS])
    return shown + (f"  and {len(load) - _EXPERTS:,} more" if len(load) > _EXPERTS else "")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
