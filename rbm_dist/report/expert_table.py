"""What the experts of a run do, as one terminal table per memory."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rbm_dist.report.table import mixture_lines, short_name

# More classes than this do not fit into 80 columns as one character each.
_CLASSES = 16
_NEAREST = 3
_NAME = 10  # characters of a class that are shown
_BLOCKS = " ▁▂▃▄▅▆▇█"


def expert_tables(figures: dict[str, Any]) -> Group:
    """A table per memory of `figures` (as in `inspect.json`), with its own figures below, and the whole mixture's."""
    parts: list[Any] = []
    whole = len(figures["layers"]) < len(figures["mixture"]["distance_per_layer"])
    for index, layer in enumerate(figures["layers"]):
        name = "All layers" if whole else f"Layer {index}"
        parts += [_table(name, layer, figures), _summary(layer), Text()]
    names = figures.get("class_names") or []
    if 0 < len(names) <= _CLASSES:  # what the columns of blocks stand for
        shown = ", ".join(f"{cls} {short_name(each)}" for cls, each in enumerate(names))
        parts.append(Text(f"classes: {shown}"))
    return Group(*parts, Text("\n".join(mixture_lines(figures["mixture"]))))


def _table(name: str, layer: dict[str, Any], figures: dict[str, Any]) -> Table:
    num_classes = len(layer["experts"][0]["class_share"] or figures["class_share"] or [])
    heat_map = 0 < num_classes <= _CLASSES
    highest = max((max(expert["class_share"] or [0]) for expert in layer["experts"]), default=0)
    table = Table(
        title=f"{name}: {layer['num_experts']} experts, {layer['top_k']} per row",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in ("expert", "rows", "first", "class", "purity"):
        table.add_column(column, justify="right", no_wrap=True)
    if heat_map:
        table.add_column(f"0…{num_classes - 1}".center(num_classes), no_wrap=True)
    table.add_column("cos", justify="right", no_wrap=True)
    table.add_column("degree", no_wrap=True)
    table.add_column("nearest nodes")
    for expert in layer["experts"]:
        shares = ["".join(_block(share / highest) for share in expert["class_share"] or [])] if heat_map else []
        table.add_row(
            str(expert["expert"]),
            "dead" if expert["dead"] else f"{expert['pair_share']:.1%}",
            f"{expert['first_choice_share']:.1%}",
            _class(expert),
            "–" if expert["purity"] is None else f"{expert['purity']:.0%}",
            *shares,
            "–" if expert["mean_cosine"] is None else f"{expert['mean_cosine']:.2f}",
            _degree(expert["degree_lift"], figures["degree_buckets"]),
            " ".join(str(node["node_id"]) for node in expert["nearest"][:_NEAREST]),
            style="red" if expert["dead"] else None,
        )
    return table


def _class(expert: dict[str, Any]) -> str:
    if expert["class"] is None:
        return "–"
    return short_name(expert["class_name"] or str(expert["class"]), _NAME)


def _summary(layer: dict[str, Any]) -> Text:
    nmi, closest, dead = layer["class_nmi"], layer["closest_memories"], layer["dead_experts"]
    lines = [
        f"routing entropy {layer['load_entropy_bits']:.2f} of {layer['load_entropy_max_bits']:.2f} bits, "
        f"gate entropy per row {layer['gate_entropy_bits']:.2f} of {layer['gate_entropy_max_bits']:.2f} bits",
        f"expert and class: {'–' if nmi is None else f'{nmi:.2f}'} normalised mutual information",
    ]
    if closest:
        lines.append(
            f"closest memories: {closest['experts'][0]} and {closest['experts'][1]}, cosine {closest['cosine']:.2f}"
        )
    lines.append(f"dead experts: {', '.join(map(str, dead)) or 'none'}")
    return Text("\n".join(f"  {line}" for line in lines))


def _block(share: float) -> str:
    """Taller for a larger share of the layer's highest; blank below 1/16 of it."""
    return _BLOCKS[round(share * (len(_BLOCKS) - 1))]


def _degree(lift: list[float] | None, buckets: list[dict[str, Any]]) -> str:
    """The degrees that the expert gets most above their share in the graph, and how far above."""
    if lift is None:
        return "–"
    most = max(range(len(lift)), key=lift.__getitem__)
    first, last = buckets[most]["from"], buckets[most]["to"]
    degrees = str(first) if first == last else f"≥{first}" if most == len(lift) - 1 else f"{first}–{last}"
    return f"{degrees} ×{lift[most]:.1f}"
