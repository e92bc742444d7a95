"""How an input was understood, in figures and words: what became a feature, a class, an id, an edge, what did not."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from rbm_dist.config.source import SourceSection
from rbm_dist.graph.splits import SPLIT_NAMES
from rbm_dist.sources.scaling import Moments, Scaling
from rbm_dist.sources.streamed import About

_FAR = 1e3
"""How many times a column may reach beyond the middle one before that is said."""
_BEYOND = 1e6
"""The same where every column is scaled by its own statistics."""


def summarise(
    settings: SourceSection,
    about: About,
    num_classes: int,
    label_N: np.ndarray,
    split_N: np.ndarray,
    edges: dict[str, int],
    moments: Moments,
    scaling: Scaling,
) -> dict[str, Any]:
    """The summary of a source, ready for JSON. `edges`: counts, by what became of them."""
    classes = about.class_names or [str(cls) for cls in range(num_classes)]
    counts = np.bincount(label_N[label_N >= 0], minlength=num_classes)
    given = about.notes.get("split")
    drawn = f"drawn, {settings.train_per_class} + {settings.val_per_class} of each class"
    names = [name for name, _ in about.features or []] or [str(k) for k in range(len(moments.mean))]
    types = [kind for _, kind in about.features or []] or [""] * len(names)
    return {
        "nodes": {"rows": len(label_N), "from": about.notes.get("nodes", "")},
        "ids": about.notes.get("ids", "row numbers"),
        "label": {
            "from": about.notes.get("label", ""),
            "classes": [{"name": name, "nodes": int(count)} for name, count in zip(classes, counts, strict=False)],
            "unlabelled": int(np.sum(label_N < 0)),
        },
        "split": {"from": given or drawn}
        | {name: int(np.sum(split_N == code)) for code, name in SPLIT_NAMES.items()},
        "features": [
            {"name": name, "type": kind, "min": _finite(low), "max": _finite(high), "missing": int(missing)}
            for name, kind, low, high, missing in zip(
                names, types, moments.low, moments.high, moments.missing, strict=True
            )
        ],
        "scaled": described(settings, scaling),
        "edges": {"from": about.notes.get("edges", ""), **edges},
        "left_out": [{"what": what, "why": why} for what, why in about.left_out],
        "warnings": [*about.warnings, *_warnings(settings.normalize, names, moments)],
    }  # fmt: skip


def described(settings: SourceSection, scaling: Scaling) -> str:
    """What is done to features before they are learned from."""
    centred = "centred and " if scaling.shift.any() else ""
    parts = {
        "auto": ["each row scaled to length 1"] if scaling.rows else [f"columns {centred}kept in proportion"],
        "column": [f"columns {centred}scaled, each to deviation 1"],
        "row": ["each row divided by its sum"],
        "none": [],
    }[settings.normalize]
    if settings.missing != "refuse":
        parts.append(f"missing values become {'the mean' if settings.missing == 'mean' else '0'}")
    return ", ".join(parts) or "as they are"


def feature_groups(features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring columns of one type whose names differ in their last number, as one entry with all their values."""

    def stem(feature: dict[str, Any]) -> tuple[str, str]:
        return re.sub(r"\d+(\]?)$", r"#\1", feature["name"]), feature["type"]

    groups = []
    for _, found in groupby(features, stem):
        members = list(found)
        low, high = ([each[key] for each in members if each[key] is not None] for key in ("min", "max"))
        first, last = members[0]["name"], members[-1]["name"]
        groups.append(
            {
                "name": first if len(members) == 1 else f"{first} … {last}", "type": members[0]["type"],
                "columns": len(members), "min": min(low, default=None), "max": max(high, default=None),
                "missing": sum(each["missing"] for each in members),
            }
        )  # fmt: skip
    return groups


def _warnings(normalize: str, names: list[str], moments: Moments) -> list[str]:
    warnings = []
    empty = moments.count == 0
    constant = np.flatnonzero((moments.high == moments.low) & ~empty)
    if len(constant):
        warnings.append(_tells_nothing(names, constant, "the same"))
    if empty.any():
        warnings.append(_tells_nothing(names, np.flatnonzero(empty), "missing"))
    reach = np.maximum(np.abs(moments.low), np.abs(moments.high))
    reach[empty] = 0
    middle = float(np.quantile(reach[reach > 0], 0.5, method="lower")) if reach.any() else 0.0
    by_column = normalize in ("auto", "column")
    for column in np.flatnonzero(reach > (_BEYOND if by_column else _FAR) * max(middle, 1e-30))[:5]:
        done = "It is scaled by itself" if by_column else "Set source.normalize to auto, or drop it"
        warnings.append(
            f"column {names[column]} ranges from {moments.low[column]:.4g} to {moments.high[column]:.4g}, while half "
            f"of the columns stay within ±{middle:.4g}: another unit, or a stand-in for a missing value? {done}"
        )
    return warnings


def _tells_nothing(names: list[str], which: np.ndarray, what: str) -> str:
    shown = ", ".join(names[column] for column in which[:5])
    more = f" and {len(which) - 5:,} more" if len(which) > 5 else ""
    if len(which) == 1:
        return f"column {shown} is {what} in every row and tells nothing"
    return f"columns {shown}{more} are {what} in every row and tell nothing"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
