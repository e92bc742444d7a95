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
        merged = figures.get("mixture", {}).get("merged")
        table.add_row(
            NAMES.get(name, name) + (", as an MLP" if merged else ""),
            *(_percent(figures[split]) for split in splits),
            *(f"{latency[batch]:,.1f}" if latency else "–" for batch in ("1", "1024")),
            "no" if name == "teacher" else "yes",
            style="bold" if name == "rbm" else None,
        )
    lines: list[Any] = [table]
    best = max(baselines, key=lambda name: baselines[name]["val"], default=None)
    if best and results["teacher"]["val"] <= baselines[best]["val"]:
        lines.append(Text(_NO_BETTER.format(NAMES[best])))
    mixture = results["students"].get("rbm", {}).get("mixture")  # a run of an earlier version has none
    if mixture:
        lines += [Text(line) for line in mixture_lines(mixture)]
        mlp, rbm = results["students"].get("mlp"), results["students"]["rbm"]
        if mlp and not mixture["merged"] and rbm["val"] <= mlp["val"]:
            lines.append(
                Text(
                    f"On validation the RbM is not ahead of the MLP ({_percent(rbm['val'])}, {_percent(mlp['val'])}): "
                    "its experts do not earn their place here; serve the MLP."
                )
            )
    seconds = results["seconds"]
    spent = "  ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    lines.append(Text(f"seconds per stage: {spent}  (total {sum(seconds.values()):.1f})"))
    return Group(*lines)


def mixture_lines(mixture: dict[str, Any]) -> list[str]:
    """What the experts of an RbM do, and whether it is more than an MLP, in a few lines."""
    lines = []
    loads = mixture["expert_load"]
    for index, (load, effective) in enumerate(zip(loads, mixture["effective_experts"], strict=True)):
        unused = [str(expert) for expert, share in enumerate(load) if not share]
        without = f"; without any: {', '.join(unused)}" if unused else ""
        layer = f", layer {index}" if len(loads) > 1 else ""
        lines.append(
            f"share of rows per expert{layer}: {_shares(load)}{without} (as {effective:.1f} that share them equally)"
        )
    apart = ", ".join(f"{distance:.2f}" for distance in mixture["distance_per_layer"])
    averaged, permuted = mixture["averaged"], mixture["permuted"]
    lines.append(
        f"RbM with all its experts: {_percent(mixture['val'])} on validation; averaged into one: "
        f"{_percent(averaged['val'])}; memories permuted: {_percent(permuted['val'])}; experts are {apart} of their "
        "length from their mean, by layer"
    )
    if mixture["merged"]:
        lines.append(
            "The RbM is in effect an MLP: its experts averaged into one do as well on validation "
            "(student.merge_tolerance), so that MLP is served."
        )
    return lines


def _shares(load: list[float]) -> str:
    shown = "  ".join(f"{share:.0%}" for share in load[:_EXPERTS])
    return shown + (f"  and {len(load) - _EXPERTS:,} more" if len(load) > _EXPERTS else "")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
