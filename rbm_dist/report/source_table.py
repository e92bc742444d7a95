"""The summary of a source for people: how an input was understood, and what was left out."""

from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rbm_dist.graph.splits import SPLIT_NAMES
from rbm_dist.sources.summary import feature_groups

_LINES = 12
"""Groups of features, classes, or parts left out that are shown."""


def source_table(summary: dict[str, Any]) -> Padding:
    """A line or a few for nodes, ids, label, split, features, edges, what was left out, and warnings."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in source_rows(summary):
        table.add_row(name, text)
    lines: list[Any] = [table]
    lines += [Text(f"! {warning}", style="yellow") for warning in summary["warnings"]]
    return Padding(Group(*lines), (0, 0, 0, 4))


def source_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What is said of nodes, ids, label, split, features, edges and of what was left out; some of it in lines."""
    edges, split = summary["edges"], summary["split"]
    sizes = ", ".join(f"{name} {split[name]:,}" for name in SPLIT_NAMES.values() if split.get(name))
    counts = {
        "self_loops": "self-loops dropped", "duplicates": "duplicates dropped", "unknown": "to unknown nodes dropped",
        "hidden": "from unseen nodes left out",
    }  # fmt: skip
    dropped = [f"{edges[name]:,} {what}" for name, what in counts.items() if edges.get(name)]
    read = [f"{edges['read']:,} read" if edges.get("read") is not None else "", *dropped]
    kept = f"{edges['kept']:,} kept, reverses included" if edges.get("kept") is not None else ""
    left_out = [f"{each['what']} ({each['why']})" for each in summary["left_out"]]
    rows = [
        ("nodes", _joined([f"{summary['nodes']['rows']:,}", summary["nodes"]["from"]], "; ")),
        ("ids", summary["ids"]),
        ("label", _label(summary["label"])),
        ("split", _joined([split["from"], sizes], ": ")),
        ("features", "\n".join(_features(summary))),
        ("edges", _joined([edges["from"], ", ".join(filter(None, [*read, kept]))], ": ")),
        ("left out", "\n".join(_first(left_out))),
    ]
    return [row for row in rows if row != ("left out", "")]


def _label(label: dict[str, Any]) -> str:
    classes = [f"{each['name']} ({each['nodes']:,})" for each in label["classes"] if each["nodes"]]
    shown = ", ".join(classes[:_LINES]) + (f" and {len(classes) - _LINES:,} more" if len(classes) > _LINES else "")
    unlabelled = f"; {label['unlabelled']:,} nodes without label" if label["unlabelled"] else ""
    return _joined([label["from"], f"{len(label['classes']):,} classes", shown], ": ") + unlabelled


def _features(summary: dict[str, Any]) -> Iterable[str]:
    groups = feature_groups(summary["features"])
    scaled = f"; {summary['scaled']}" if summary["scaled"] else ""
    yield f"{len(summary['features']):,}{scaled}"
    yield from _first([_group(each) for each in groups])


def _group(group: dict[str, Any]) -> str:
    count = f"{group['columns']:,} × " if group["columns"] > 1 else ""
    kind = f"({count}{group['type']})" if group["type"] else f"({group['columns']:,})" if count else ""
    between = f": {group['min']:.4g} to {group['max']:.4g}" if group["min"] is not None else ""
    missing = f", {group['missing']:,} missing" if group["missing"] else ""
    return f"{group['name']} {kind}".rstrip() + between + missing


def _first(lines: list[str]) -> list[str]:
    return lines[:_LINES] + ([f"and {len(lines) - _LINES:,} more"] if len(lines) > _LINES else [])


def _joined(parts: list[str], between: str) -> str:
    return between.join(filter(None, parts))
