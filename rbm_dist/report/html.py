"""The report of a run as one HTML page that needs no other file, no network and no script.

`report.html.jinja` has the page, where Jinja escapes all that comes from a user's data; here is what stands in it.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from rbm_dist import __version__, storage
from rbm_dist.config.load import flatten
from rbm_dist.report import charts
from rbm_dist.report.plan_table import duration
from rbm_dist.report.source_table import source_rows
from rbm_dist.report.table import accuracy_rows, models, notes, percent, served, short_name, shown_name
from rbm_dist.report.update_table import update_rows

_MARK = '<meta name="generator" content="rbm-dist report'
_HEAD = 400  # bytes of a page within which the mark stands
_CLASSES = 24  # that are drawn
_LONG = 30  # rows of a table beyond which it is folded
_NAME = 60  # characters of a class in a table
_SPLITS = ("val", "test", "unseen")
_SECTIONS = {
    "accuracy": "Accuracy", "classes": "Accuracy by class", "training": "Training", "experts": "Experts and classes",
    "specialisation": "Are the experts different?", "latency": "Latency", "time": "Time of the stages",
    "graph": "Graph", "configuration": "Configuration",
}  # fmt: skip

Facts = dict[str, Any]


@dataclass(frozen=True)
class PageTable:
    """A table; `strong`: the names of rows that stand out."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    strong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart and its title, of which a page has no second."""

    title: str
    svg: Markup


def report_page(facts: Facts) -> str:
    """The page of `stages.report.run_facts`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    results = facts["results"]
    finished = datetime.fromtimestamp(facts["finished"], UTC).strftime("%d %B %Y, %H:%M UTC")
    return environment.get_template("report.html.jinja").render(
        mark=Markup(f'{_MARK} {__version__}">'), title=facts["url"].rstrip("/").rsplit("/", 1)[-1],
        subtitle=f"{facts['url']}, finished on {finished}", sections=_SECTIONS, cards=_cards(results),
        accuracy=_accuracy(results), notes=notes(results), classes=_classes(results), curves=_curves(facts),
        experts=_experts(facts["experts"]), mixture=_mixture(results), latency=_latency(results), time=_time(facts),
        graph=_graph(facts), config=_config(facts["config"]), made_by=", ".join(facts["made_by"]),
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    )  # fmt: skip


def is_report(url: str) -> bool:
    """Whether a file is such a page."""
    fs, path = storage.filesystem(url)
    try:
        return _MARK.encode() in fs.cat_file(path, start=0, end=_HEAD)
    except OSError:
        return False


def _chart(title: str, figure: Figure) -> Chart:
    return Chart(title, Markup(charts.svg(figure, title)))


def _cards(results: Facts) -> list[tuple[str, str, str]]:
    """What a reader looks for first: a name, a figure, what it is of."""
    student = served(results)
    split = "unseen" if results["teacher"].get("unseen") is not None else "test"
    of, teacher = results["students"][student], results["teacher"]
    slow, fast = (results["latency_us"].get(name, {}).get("1") for name in ("teacher", student))
    cards = [
        (shown_name(student, results), percent(of[split]), f"of {split} nodes right"),
        ("Teacher", percent(teacher[split]), f"of {split} nodes right"),
    ]
    if slow and fast:
        cards.append(("Faster than the teacher", f"{slow / fast:,.1f} ×", f"{fast:,.1f} µs for a single node"))
    seconds = sum(results["seconds"].values())
    return [*cards, ("Time of all stages", duration(seconds), f"{len(results['seconds'])} stages")]


def _accuracy(results: Facts) -> dict[str, Any]:
    header, *rows = accuracy_rows(results)
    values = [
        (shown_name(name, results), {split: each[split] for split in _SPLITS if each.get(split) is not None})
        for name, each in models(results).items()
        if name != "majority"  # far from the others, which would then stand on one spot
    ]
    strong = (shown_name(served(results), results),)
    return {
        "table": PageTable("Accuracy and µs per node (one thread)", header, rows, strong),
        "chart": _chart("Accuracy of all models but the majority class", charts.dot_chart(values, "accuracy")),
    }


def _classes(results: Facts) -> dict[str, Any] | None:
    found = results.get("classes")  # a run of an earlier version has none
    if not found:
        return None
    every = [name for name in models(results) if name != "majority"]  # right on one class, and on no other
    drawn = ["teacher", *results["students"]]
    student = served(results)
    tested = [each for each in found if each["nodes"]]
    weakest = sorted(tested, key=lambda each: (each["accuracy"][student], -each["nodes"]))[:_CLASSES]
    values = [(each["name"], {shown_name(name, results): each["accuracy"][name] for name in drawn}) for each in weakest]
    rows = [
        [short_name(each["name"], _NAME), f"{each['nodes']:,}", *(percent(each["accuracy"][name]) for name in every)]
        for each in found
    ]
    header = ["class", "test nodes", *(shown_name(name, results) for name in every)]
    few = len(weakest) < len(tested)
    return {
        "shown": f"; of {len(tested):,} classes the {_CLASSES} on which {shown_name(student, results)} is weakest "
        "are drawn" if few else "",
        "chart": _chart("Accuracy by class, weakest first", charts.dot_chart(values, "accuracy on test nodes")),
        "table": PageTable(f"Every class ({len(found):,})", header, rows),
        "open": len(rows) <= _LONG,
    }  # fmt: skip


def _curves(facts: Facts) -> list[Chart]:
    return [
        _chart(f"Training of {loop}, {len(rows):,} epochs", charts.curve_chart(rows, facts["chosen"].get(loop)))
        for loop, rows in facts["loops"].items()
    ]


def _experts(figures: Facts | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    layers = []
    classes = len(figures["class_share"] or [])
    for index, layer in enumerate(figures["layers"]):
        name = f"Layer {index}" if len(figures["layers"]) > 1 else "All layers"
        nmi, closest = layer["class_nmi"], layer["closest_memories"]
        facts = [
            ("experts", f"{layer['num_experts']}, of which a row gets {layer['top_k']}"),
            ("load entropy", f"{layer['load_entropy_bits']:.2f} of {layer['load_entropy_max_bits']:.2f} bits"),
            ("expert and class", f"{'–' if nmi is None else f'{nmi:.2f}'} normalised mutual information"),
            ("without rows", ", ".join(map(str, layer["dead_experts"])) or "none"),
        ]
        if closest:
            first, second = closest["experts"]
            facts.append(("closest memories", f"{first} and {second}, cosine {closest['cosine']:.2f}"))
        rows = [
            [
                str(each["expert"]), percent(each["pair_share"]), percent(each["first_choice_share"]),
                "–" if each["class"] is None else short_name(each["class_name"] or str(each["class"])),
                percent(each["purity"]), "–" if each["mean_cosine"] is None else f"{each['mean_cosine']:.2f}",
            ]
            for each in layer["experts"]
        ]  # fmt: skip
        header = ["expert", "rows", "first choice", "class it gets most", "its share", "mean cosine"]
        picture = charts.expert_chart(layer, classes, figures["class_names"])
        layers.append(
            {
                "facts": facts, "table": PageTable(f"{name}: every expert", header, rows), "open": len(rows) <= _LONG,
                "chart": _chart(f"{name}: share of each class among an expert's rows", picture),
            }
        )  # fmt: skip
    return {"nodes": f"{figures['num_nodes']:,}", "layers": layers}


def _mixture(results: Facts) -> dict[str, Any] | None:
    mixture = results["students"].get("rbm", {}).get("mixture")
    if mixture is None:
        return None
    kinds = {"all experts": mixture, "averaged into one": mixture["averaged"], "permuted": mixture["permuted"]}
    splits = [split for split in _SPLITS if mixture.get(split) is not None]
    values = [(name, {split: each[split] for split in splits}) for name, each in kinds.items()]
    rows = [[name, *map(percent, each.values())] for name, each in values]
    effective = [f"{each:.1f} of {len(load)}" for each, load in _by_memory(mixture)]
    return {
        "chart": _chart("Accuracy of the RbM, averaged, and permuted", charts.dot_chart(values, "accuracy")),
        "table": PageTable("Accuracy", ["RbM", *splits], rows),
        "facts": [
            ("distance", ", ".join(f"{each:.2f}" for each in mixture["distance_per_layer"])
             + ": of the experts from their mean, relative to their length, by layer"),
            ("effective experts", f"{'; '.join(effective)}: so many would share the rows equally"),
            ("served", "the MLP of the averaged experts" if mixture["merged"] else "the RbM with all its experts"),
        ],
        "loads": [
            _chart(f"Load of the experts{f', layer {index}' if len(effective) > 1 else ''}", charts.load_chart(load))
            for index, (_, load) in enumerate(_by_memory(mixture))
        ],
    }  # fmt: skip


def _by_memory(mixture: Facts) -> list[tuple[float, list[float]]]:
    return list(zip(mixture["effective_experts"], mixture["expert_load"], strict=True))


def _latency(results: Facts) -> dict[str, Any]:
    known = [name for name in models(results) if name in results["latency_us"]]
    latency = {shown_name(name, results): results["latency_us"][name] for name in known}
    batches = sorted({int(batch) for each in latency.values() for batch in each})
    names = {str(batch): f"batch of {batch:,}" for batch in batches}
    values = [(name, {names[batch]: value for batch, value in each.items()}) for name, each in latency.items()]
    rows = [
        [name, *(f"{each[batch]:,.1f}" if batch in each else "–" for batch in names)] for name, each in latency.items()
    ]
    return {
        "chart": _chart("µs per node", charts.dot_chart(values, "µs per node (logarithmic)", share=False)),
        "table": PageTable("µs per node by batch size", ["model", *names.values()], rows),
    }


def _time(facts: Facts) -> dict[str, Any]:
    measured, planned = facts["results"]["seconds"], facts["planned"] or {}
    values: list[tuple[str, dict[str, float | None]]] = [
        (stage, {"measured": max(spent, 1e-3)} | ({"predicted": planned[stage]} if stage in planned else {}))
        for stage, spent in measured.items()
    ]
    rows = [
        [stage, f"{spent:,.1f} s", duration(planned[stage]) if stage in planned else "–"]
        for stage, spent in measured.items()
    ]
    total = sum(planned[stage] for stage in measured if stage in planned)
    rows.append(["total", f"{sum(measured.values()):,.1f} s", duration(total) if planned else "–"])
    return {
        "note": facts["plan_note"],
        "chart": _chart("Seconds by stage", charts.dot_chart(values, "seconds (logarithmic)", share=False)),
        "table": PageTable("Time by stage", ["stage", "measured", "predicted"], rows, ("total",)),
    }


def _graph(facts: Facts) -> dict[str, Any]:
    graph, summary = facts["graph"], facts["summary"]
    rows = []
    if graph:
        kind = "sparse" if graph["sparse_features"] else "dense"
        cut = graph.get("partition", {}).get("cut_share")
        rows = [
            ("size", f"{graph['num_nodes']:,} nodes, {graph['num_edges']:,} directed edges, "
             f"{graph['num_features']:,} {kind} features, {graph['num_classes']:,} classes"),
            ("parts", f"{len(graph['offsets']) - 1:,}" + (f", {cut:.1%} of the edges between parts" if cut else "")),
        ]  # fmt: skip
    if facts.get("update"):
        return {"facts": [*rows, *update_rows(facts["update"])], "warnings": [], "classes": None}
    if summary is None:
        return {"facts": [*rows, ("source", "its summary is not there any more")], "warnings": [], "classes": None}
    label = summary["label"]
    classes = [[short_name(each["name"], _NAME), f"{each['nodes']:,}"] for each in label["classes"]]
    return {
        "facts": [*rows, *source_rows(summary)],
        "warnings": summary["warnings"],
        "classes": PageTable(f"Classes and their nodes ({len(classes):,})", ["class", "nodes"], classes),
    }


def _config(tree: Facts) -> dict[str, Any]:
    rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in flatten(tree).items()]
    return {"caption": f"All {len(rows)} keys, as the run was started with them", "rows": rows}
