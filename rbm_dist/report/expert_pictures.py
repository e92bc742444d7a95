"""What the experts of a layer get, as a picture: a heat map expert × class, and a 2-D map of inputs and memories."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rbm_dist.report.table import short_name

if TYPE_CHECKING:  # matplotlib is imported when something is drawn: that takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by the colour-blind: the muted scheme of P. Tol, "Colour schemes", SRON/EPS/TN/09-002, 2021; and black.
_COLOURS = [
    "#332288", "#ddcc77", "#117733", "#cc6677", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499", "#000000",
]  # fmt: skip
_MARKERS = "o^sD"
_OTHER = "#c8c8c8"
_CELLS = 400  # more cells than this are too small to write a figure into
_TICKS = 32
_NAME = 16  # characters of a class that are shown
_CROWD = 16  # more memories than this are drawn small


@dataclass(frozen=True)
class InputMap:
    """A sample of a layer's inputs and its memories, in the plane."""

    points_S2: np.ndarray
    class_S: np.ndarray  # −1: none
    memories_E2: np.ndarray
    variance_2: np.ndarray  # share of the variance that each axis shows


def layer_picture(
    index: int, layer: dict[str, Any], class_share: list[float] | None, points: InputMap,
    class_names: list[str] | None = None,
) -> "Figure":  # fmt: skip
    """One layer of `inspect.json` (the index-th), and the map of its inputs.

    `class_share` is that of the whole graph: it decides which classes get a colour where there are many. Without names
    the classes are numbers.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    experts, classes = len(layer["experts"]), len(class_share or [])
    height = min(max(5.6, 1.6 + 0.28 * experts), 9.0)
    left = min(max(5.6, 1.8 + 0.42 * classes), 11.0)
    style: Any = {
        "font.size": 9, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "text.parse_math": False,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(left + 7.6, height), dpi=150, layout="constrained")
        heat, plane = figure.subplots(1, 2, width_ratios=[left, 7.6])
        figure.suptitle(_title(index, layer), fontsize=13, fontweight="bold", x=0.008, ha="left")
        draw_heat_map(figure, heat, layer, classes, class_names)
        _draw_map(plane, class_share or [], points, class_names)
    return figure


def png(figure: "Figure") -> bytes:
    """The picture as a file; the same bytes for the same picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _title(index: int, layer: dict[str, Any]) -> str:
    entropy = f"routing entropy {layer['load_entropy_bits']:.2f} of {layer['load_entropy_max_bits']:.2f} bits"
    nmi = "" if layer["class_nmi"] is None else f"  ·  expert–class NMI {layer['class_nmi']:.2f}"
    return f"Layer {index}: {layer['num_experts']} experts, {layer['top_k']} per row  ·  {entropy}{nmi}"


def draw_heat_map(
    figure: "Figure", axes: "Axes", layer: dict[str, Any], classes: int, class_names: list[str] | None
) -> None:
    """The share of each class among an expert's rows: a row per expert, a column for each of so many classes."""
    experts = layer["experts"]
    axes.set_title(f"Classes that each expert gets{' (grey: no rows)' if layer['dead_experts'] else ''}")
    axes.set_xlabel("class")
    axes.set_ylabel("expert (share of rows)")
    every = -(-len(experts) // _TICKS)
    axes.set_yticks(
        range(0, len(experts), every),
        [f"{each['expert']}  (dead)" if each["dead"] else f"{each['expert']}  ({each['pair_share']:.1%})"
         for each in experts[::every]],
    )  # fmt: skip
    ticks = range(0, classes, -(-classes // _TICKS) or 1)
    axes.set_xticks(ticks, [short_name(class_names[cls], _NAME) for cls in ticks] if class_names else None)
    if class_names:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if not classes:
        axes.text(0.5, 0.5, "no node has a class", transform=axes.transAxes, ha="center")
        return
    share_EC = np.array([each["class_share"] or [np.nan] * classes for each in experts])
    axes.set_facecolor("#eeeeee")  # shows where an expert has no rows
    image = axes.imshow(share_EC, cmap="Blues", vmin=0, vmax=max(float(np.nanmax(share_EC)), 1e-9), aspect="auto")
    bar = figure.colorbar(image, ax=axes, label="share of the expert's rows", pad=0.02, aspect=40)
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    bar.outline.set_visible(False)
    if share_EC.size <= _CELLS:
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(experts) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        for (row, column), share in np.ndenumerate(share_EC):
            if share >= 0.005:
                colour = "white" if share > 0.6 * image.norm.vmax else "black"  # type: ignore[operator]
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)


def _draw_map(axes: "Axes", class_share: list[float], points: InputMap, class_names: list[str] | None) -> None:
    from matplotlib.patheffects import withStroke

    styles = [(colour, marker) for marker in _MARKERS for colour in _COLOURS]
    shown = sorted(np.argsort(-np.asarray(class_share), kind="stable")[: len(styles)].tolist())
    others = ~np.isin(points.class_S, shown)
    rows = len(points.points_S2)
    axes.set_title(f"Inputs of {rows:,} nodes, and the memories")
    size = 18 if rows > 500 else 30
    for (colour, marker), each in zip(styles, shown, strict=False):
        x, y = points.points_S2[points.class_S == each].T
        axes.scatter(x, y, s=size, color=colour, marker=marker, edgecolors="white", linewidths=0.3, alpha=0.85,
                     label=f"{each}: {short_name(class_names[each], _NAME)}" if class_names else str(each))  # fmt: skip
    if others.any():
        label = "none" if (points.class_S[others] < 0).all() else "others"
        x, y = points.points_S2[others].T
        axes.scatter(x, y, s=size, c=_OTHER, linewidths=0, zorder=0.9, label=label)
    star, number = (230, 10) if len(points.memories_E2) <= _CROWD else (70, 7)
    x, y = points.memories_E2.T
    axes.scatter(x, y, s=star, marker="*", color="white", edgecolors="black", linewidths=1.1,
                 zorder=3, label="memory")  # fmt: skip
    outline = withStroke(linewidth=3, foreground="white")
    for names, (x, y) in _labels(points, near=0.004 * number):
        axes.annotate(names, (x, y), xytext=(number - 3, number - 4), textcoords="offset points", fontsize=number,
                      fontweight="bold", zorder=4, path_effects=[outline])  # fmt: skip
    axes.set_xlabel(f"1st principal component ({points.variance_2[0]:.0%} of the variance)")
    axes.set_ylabel(f"2nd principal component ({points.variance_2[1]:.0%} of the variance)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=1.3,
                ncols=1 + len(shown) // 24)  # fmt: skip


def _labels(points: InputMap, near: float) -> list[tuple[str, np.ndarray]]:
    """The numbers of the memories and where they stand; one label for memories nearer than a share of the picture."""
    near *= np.ptp(np.concatenate([points.points_S2, points.memories_E2]), axis=0).max()
    groups: list[tuple[list[str], np.ndarray]] = []
    for expert, at in enumerate(points.memories_E2):
        group = next((names for names, place in groups if np.abs(place - at).max() < near), None)
        if group is None:
            groups.append(([str(expert)], at))
        else:
            group.append(str(expert))
    return [(", ".join(names), at) for names, at in groups]
