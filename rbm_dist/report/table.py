"""The results of a run as a table."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rbm_dist.config.teacher import CONVS, MEAN, TEACHERS

NAMES = {
    "majority": "majority class",
    "regression": "logistic regression",
    "mlp": "MLP (GLNN)",
    "mlp_x2": "MLP × 2",
    "mlp_x4": "MLP × 4",
    "mlp_x8": "MLP × 8",
    "ensemble": "ensemble of MLPs",
    "moe": "vanilla MoE",
    "rbm": "RbM",
}

_NO_BETTER = "On validation the teacher is no better than the baseline '{}': students have little to learn from it."
_WHY = (
    " Its features may have a scale that it cannot learn from (source.normalize, teacher.norm, teacher.weight_decay), "
    "its training may be too short (teacher.epochs, teacher.lr), or edges mostly join nodes of different classes, "
    "which a GNN averages away: then the baseline is the better choice."
)
_NOT_AS_RIGHT = (
    "The teacher is not as right as it is sure: students take over its mistakes; try teacher.calibrate: true."
)

_EXPERTS = 16  # whose shares are shown
_UNCALIBRATED, _AT_ODDS = 0.1, 0.5  # calibration error and disagreement of soft labels that are warned about
_WORST = 3  # classes that are named
_NAME = 20  # characters of a class that are shown
_SHORT = 10  # where three of them share a line


def results_table(results: dict[str, Any]) -> Group:
    """Accuracy and latency of every model, expert load, and the time each stage took."""
    table = Table(title="Accuracy (epoch chosen on val) and µs per node by batch size (one thread)")
    header, *rows = accuracy_rows(results)
    for column in header:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in zip(models(results), rows, strict=True):
        table.add_row(*row, style="bold" if name == "rbm" else None)
    return Group(table, *(Text(line) for line in [*notes(results), _seconds(results["seconds"])]))


def models(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of baselines, teacher and students, in the order in which they are shown."""
    # A run of an earlier version has no baselines.
    return {**results.get("baselines", {}), "teacher": results["teacher"], **results["students"]}


def shown_name(model: str, results: dict[str, Any]) -> str:
    """A model's name for people."""
    if model == "teacher":
        conv = results.get("teacher_model", MEAN)  # a run of an earlier version has none
        return f"teacher ({(CONVS | TEACHERS).get(conv, conv.rpartition(':')[2])})"
    merged = models(results)[model].get("mixture", {}).get("merged")
    return NAMES.get(model, model) + (", as an MLP" if merged else "")


def served(results: dict[str, Any]) -> str:
    """The student that a run is asked for unless another is named: the RbM, or the best one on validation."""
    students = results["students"]
    return "rbm" if "rbm" in students else max(students, key=lambda name: students[name]["val"] or 0.0)


def accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    """A header, and a row of text per model."""
    splits = [split for split in ("val", "test", "unseen") if split != "unseen" or results["teacher"].get(split)]
    rows = [["model", *splits, "µs @ 1", "µs @ 1,024", "graph-free"]]
    for name, figures in models(results).items():
        latency = results["latency_us"].get(name)
        rows.append(
            [
                shown_name(name, results),
                *(percent(figures[split]) for split in splits),
                *(f"{latency[batch]:,.1f}" if latency else "–" for batch in ("1", "1024")),
                "no" if name == "teacher" else "yes",
            ]
        )
    return rows


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, a line each: a weak teacher, weak classes, what the experts are worth."""
    lines = []
    baselines = results.get("baselines", {})
    best = max(baselines, key=lambda name: baselines[name]["val"], default=None)
    if best and results["teacher"]["val"] <= baselines[best]["val"]:
        lines.append(_NO_BETTER.format(NAMES[best]) + _WHY * (results.get("teacher_model") != "external"))
    lines += _soft_labels(results)
    lines += _worst_classes(results)
    mixture = results["students"].get("rbm", {}).get("mixture")  # a run of an earlier version has none
    if mixture:
        lines += mixture_lines(mixture)
        mlp, rbm = results["students"].get("mlp"), results["students"]["rbm"]
        if mlp and not mixture["merged"] and rbm["val"] <= mlp["val"]:
            lines.append(
                f"On validation the RbM is not ahead of the MLP ({percent(rbm['val'])}, {percent(mlp['val'])}): "
                "its experts do not earn their place here; serve the MLP."
            )
    return lines


def _soft_labels(results: dict[str, Any]) -> list[str]:
    """How sure, how right and how much at odds with neighbours the soft labels are; and what to change if they are."""
    found = results.get("soft_labels")  # a run of an earlier version has none
    if not found:
        return []
    line = (
        f"soft labels: {percent(found['confidence'])} sure and {percent(results['teacher']['val'])} right on "
        f"validation, calibration error {percent(found['calibration_error'])}"
    )
    if found["disagreement"] is not None:
        line += f"; of {percent(found['disagreement'])} of nodes another class than of their neighbours' mean"
    lines = [line]
    before, after = found.get("unsmoothed_val"), results["teacher"]["val"]
    if before is not None:
        lines.append(f"smoothed over edges (soft_labels.smooth): {percent(before)} right on validation before")
        if after < before:
            lines.append(
                "Smoothing made the soft labels worse: lower soft_labels.smooth.damping, or set its method to none."
            )
    if found["calibration_error"] > _UNCALIBRATED:
        lines.append(_NOT_AS_RIGHT)
    if (found["disagreement"] or 0.0) > _AT_ODDS:
        lines.append(
            "Neighbours mostly disagree with a node: what smooths over edges (soft_labels.smooth, "
            "encodings.label_propagation, student.krd.neighbours: all) will hurt."
        )
    return lines


def _worst_classes(results: dict[str, Any]) -> list[str]:
    """A line with the classes whose test nodes the served student gets wrong most often, where that tells something."""
    student = served(results)
    classes = results.get("classes", [])  # a run of an earlier version has none
    below = [
        (each["accuracy"][student], each)
        for each in classes
        if each["nodes"] and each["accuracy"][student] < results["students"][student]["test"]
    ]
    if not below or (len(classes) <= 2 and not results["class_names"]):
        return []
    worst = sorted(below, key=lambda entry: entry[0])[:_WORST]
    shown = [f"{short_name(each['name'], _SHORT)} ({percent(share)})" for share, each in worst]
    return [f"{NAMES[student]} is weakest on: {', '.join(shown)}"]


def short_name(name: str, most: int = _NAME) -> str:
    """A class's name in at most so many characters, on one line."""
    name = "".join(mark if mark.isprintable() else " " for mark in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _seconds(seconds: dict[str, float]) -> str:
    spent = "  ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    return f"seconds per stage: {spent}  (total {sum(seconds.values()):.1f})"


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
        f"RbM with all its experts: {percent(mixture['val'])} on validation; averaged into one: "
        f"{percent(averaged['val'])}; memories permuted: {percent(permuted['val'])}; experts are {apart} of their "
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


def percent(share: float | None) -> str:
    """A share for people; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"
