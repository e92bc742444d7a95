"""The charts of a run's report, by matplotlib, as SVG that stands in the page itself.

Text stays text and has the page's colour, so that a chart is sharp, can be searched, and is readable in dark and light.
All but the heat map are as wide as a phone; the page puts several beside each other where there is room.
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rbm_dist.report.expert_pictures import draw_heat_map
from rbm_dist.report.table import short_name

Row = dict[str, Any]
_INK = "#0a0b0c"  # stands for the page's text colour until the SVG is in the page
_WIDTH = 3.7  # inches, of 96 pixels
# Told apart on white and on black, and by their markers.
_COLOURS = ["#3b82c4", "#d9702b", "#2a9d6b", "#9a6fd0", "#d64f6a", "#1f9aa8", "#8a8a8a", "#9a8a1f"]
_MARKERS = "os^DvPX*"
_POINTS = 300  # of a curve that are drawn
_NAME = 20  # characters of a row's name that are shown
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_STYLE: Any = {
    "font.size": 9, "font.family": "DejaVu Sans", "svg.fonttype": "none",
    "text.parse_math": False, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "grid.color": _INK, "grid.alpha": 0.15, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False, "lines.linewidth": 1.6,
}  # fmt: skip


@rc_context(_STYLE)
def curve_chart(rows: Sequence[Row], chosen: int | None) -> Figure:
    """Loss above validation accuracy, by epoch, of one training loop; a line at the chosen epoch (counted from 0)."""
    figure = _figure(3.2)
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    for axes, keys in ((loss, {"loss": "training", "val_loss": "validation"}), (accuracy, {"val_accuracy": ""})):
        for key, label in keys.items():
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                x, y = thinned(np.array(points, float)).T
                axes.plot(x, y, label=label, color=_COLOURS[key == "val_loss"], marker="." if len(x) == 1 else None)
        if chosen is not None:
            axes.axvline(chosen, color=_INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
        axes.grid(axis="y")
        axes.locator_params(axis="y", nbins=5)
    loss.set_ylabel("loss")
    loss.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    accuracy.set_ylabel("val accuracy")
    accuracy.yaxis.set_major_formatter(_percentage)
    accuracy.set_xlabel("epoch" if chosen is None else f"epoch (dashed: {chosen}, the chosen one)")
    accuracy.locator_params(axis="x", nbins=6, integer=True)
    return figure


def thinned(points_P2: np.ndarray) -> np.ndarray:
    """At most some 300 of a curve's points, in order: of each stretch the lowest and the highest, and the last."""
    if len(points_P2) <= _POINTS:
        return points_P2
    kept = {len(points_P2) - 1}
    for stretch in np.array_split(np.arange(len(points_P2)), _POINTS // 2):
        y = points_P2[stretch, 1]
        kept |= {int(stretch[y.argmin()]), int(stretch[y.argmax()])}
    return points_P2[sorted(kept)]


@rc_context(_STYLE)
def dot_chart(rows: Sequence[tuple[str, dict[str, float | None]]], label: str, share: bool = True) -> Figure:
    """A row of dots per name, a dot per series. `share`: values are shares; else they are positive, on a log axis."""
    series = list(dict.fromkeys(name for _, values in rows for name in values))
    lines = -(-len(series) // 2)  # of the legend
    figure = _figure(0.75 + 0.24 * len(rows) + 0.18 * lines)
    axes = figure.subplots()
    for at, (_, values) in enumerate(rows):
        known = [value for value in values.values() if value is not None]
        if known:
            axes.plot([min(known), max(known)], [at, at], color=_INK, alpha=0.2, linewidth=1, zorder=1)
    apart = min(0.14, 0.6 / max(1, len(series)))  # so that no dot hides another
    for index, name in enumerate(series):
        shift = apart * (index - (len(series) - 1) / 2)
        points = [(values[name], at + shift) for at, (_, values) in enumerate(rows) if values.get(name) is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        marker, colour = _MARKERS[index % len(_MARKERS)], _COLOURS[index % len(_COLOURS)]
        axes.scatter(x, y, s=30, marker=marker, color=colour, linewidths=0, alpha=0.9, zorder=2, label=name)
    axes.set_yticks(range(len(rows)), [short_name(name, _NAME) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if share:
        axes.xaxis.set_major_formatter(_percentage)
        axes.locator_params(axis="x", nbins=5)
    else:
        _log_axis(axes)
    axes.grid(axis="x")
    axes.set_xlabel(label)
    if series:
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2, borderpad=0)
    return figure


@rc_context(_STYLE)
def load_chart(load: Sequence[float]) -> Figure:
    """The share of rows that each expert gets, and a line where all get the same."""
    figure = _figure(1.9)
    axes = figure.subplots()
    axes.bar(range(len(load)), load, color=_COLOURS[0])
    axes.axhline(1 / len(load), color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)))
    axes.yaxis.set_major_formatter(_percentage)
    axes.locator_params(axis="x", nbins=8, integer=True)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("expert (dashed: an equal share)")
    axes.set_ylabel("share of rows")
    return figure


@rc_context(_STYLE)
def expert_chart(layer: dict[str, Any], classes: int, class_names: list[str] | None) -> Figure:
    """The heat map of `inspect`: which classes each expert gets."""
    names = class_names or []
    height = 1.2 + 0.21 * len(layer["experts"]) + 0.06 * min(16, max(map(len, names), default=0))
    figure = _figure(min(max(2.6, height), 9.0), min(max(_WIDTH, 1.7 + 0.2 * classes), 11.0))
    draw_heat_map(figure, figure.subplots(), layer, classes, class_names)
    figure.axes[0].set_title("")  # the page has one
    return figure


def _figure(height: float, width: float = _WIDTH) -> Figure:
    return Figure(figsize=(width, height), dpi=72, layout="constrained")


def _percentage(share: float, _: object = None) -> str:
    return f"{round(100 * share, 2):g} %"


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def svg(figure: Figure, label: str) -> str:
    """The figure as an element of an HTML page; `label`, by which screen readers name it, is the page's only such."""
    stream = io.BytesIO()
    # The salt makes ids differ from those of other charts of the page.
    with rc_context({**_STYLE, "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a class's name; the browser has one
        figure.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    root.remove(root[0])  # metadata
    root.remove(root[0])  # a style, which would be the whole page's
    root.attrib |= {"role": "img", "aria-label": label}
    elements = list(root.iter())
    used = {name for each in elements for name in re.findall(r"#(\w+)", " ".join(each.attrib.values()))}
    for each in elements:
        if each.get("id") not in used:
            each.attrib.pop("id", None)
        if "style" in each.attrib:
            each.set("style", each.attrib["style"].replace(_INK, "currentColor"))
    for prefix, uri in (("", _SVG), ("xlink", _XLINK)):
        ElementTree.register_namespace(prefix, uri.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode")
