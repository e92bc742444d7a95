"""What has changed between two versions of a run, and what came of it, for people."""

from typing import Any

from rich.padding import Padding
from rich.table import Table


def update_table(facts: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> Padding:
    """The lines of `update_rows`, and validation accuracy of teacher and students. before, after: the runs' results."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    pairs = {"teacher": (before["teacher"], after["teacher"])}
    pairs |= {kind: (before["students"].get(kind), after["students"][kind]) for kind in after["students"]}
    said = [f"{kind} {_percent(old)} → {_percent(new)}" for kind, (old, new) in pairs.items() if old]
    for name, text in [*update_rows(facts), ("validation", ", ".join(said))]:
        table.add_row(name, text)
    return Padding(table, (0, 0, 0, 4))


def update_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What is said of nodes, edges, features, of what the change reaches, and of soft labels.

    facts: as `stages.update.update_facts` gives them.
    """
    nodes = facts["nodes"]
    known = [facts["edges_given"] - facts["added"], facts["drops_given"] - facts["dropped"]]
    notes = [f"{known[0]:,} were there before"] * bool(known[0])
    notes += [f"{known[1]:,} to drop were not there"] * bool(known[1])
    notes += [f"{facts['unknown']:,} to unknown nodes left out"] * bool(facts["unknown"])
    edges = f"{facts['added']:,} in-edges new, {facts['dropped']:,} gone, of {facts['edges_before']:,}"
    reached = ", ".join(_share(count, nodes) for count in facts["reached"][1:])
    return [
        ("goes on from", facts["run"]),
        ("nodes", f"{facts['nodes_before']:,} → {nodes:,}"),
        *[("features", f"of {facts['features']:,} nodes replaced")] * bool(facts["features"]),
        ("edges", "; ".join([edges, *notes])),
        ("changed", f"{facts['share']:.2%} of the nodes are new, or have other features or in-edges"),
        ("reached", f"{reached} of the nodes by 1, 2, … hops"),
        ("soft labels", _soft_labels(facts)),
    ]


def _soft_labels(facts: dict[str, Any]) -> str:
    if facts["anew"]:
        return "all made anew, and teacher and students trained anew: so much has changed (update.anew_above)"
    made = "of these nodes made anew" if facts["kept"] else "all made anew"
    return (
        f"{made}; of {facts['compared']:,} that were there before, {facts['other_class']:,} name another class; "
        f"no probability moved by more than {facts['largest_change']:.3f}; students are trained further on "
        f"{facts['moved']:,} nodes and as many others"
    )


def _share(count: int, of: int) -> str:
    return f"{count / max(1, of):.2%}"


def _percent(figures: dict[str, Any]) -> str:
    return "–" if figures["val"] is None else f"{figures['val']:.1%}"
