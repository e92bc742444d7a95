"""The tables of the experts say what the figures say, in 80 columns."""

from typing import Any

import pytest
from rich.console import Console

from rbm_dist.report.expert_table import expert_tables
from tests.report.layer import layer_figures, mixture_figures


def printed(*layers: dict[str, Any], num_classes: int) -> list[str]:
    figures = {
        "mixture": mixture_figures() | {"distance_per_layer": [0.3] * len(layers)},
        "layers": list(layers), "class_share": [1 / num_classes] * num_classes,
        "degree_buckets": [{"from": 0, "to": 3, "share": 0.6}, {"from": 4, "to": 90, "share": 0.4}],
    }  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(expert_tables(figures))
    return console.export_text().splitlines()


@pytest.mark.parametrize("num_classes", [1, 10, 16, 47])
def test_every_figure_is_shown(num_classes: int) -> None:
    layer = layer_figures(8, num_classes)
    lines = printed(layer, layer, num_classes=num_classes)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines).replace(f"0…{num_classes - 1}", ""), "nothing is cut off"
    rows = [line.split() for line in lines if line[:6].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [*range(8)] * 2
    for expert, row in zip(layer["experts"], rows, strict=False):
        if expert["dead"]:
            assert row[1:5] == ["dead", "0.0%", "–", "–"]
        else:
            assert row[1:5] == ["12.5%", "12.5%", str(expert["class"]), f"{expert['purity']:.0%}"]
            assert "0.57 ≥4 ×1.8 100000000" in " ".join(row), "the degrees with the highest lift"
    text = "\n".join(lines)
    for part in (
        "Layer 1: 8 experts, 3 per row", "routing entropy 2.25 of 3.00 bits", "gate entropy per row 1.50 of 1.58 bits",
        "0.46 normalised mutual information", "closest memories: 0 and 2, cosine 0.91", "dead experts: 1",
    ):  # fmt: skip
        assert part in text


def test_one_memory_stands_for_all_layers() -> None:
    layer = layer_figures(3, 4)
    figures = {"layers": [layer], "mixture": mixture_figures(), "class_share": [0.25] * 4, "degree_buckets": []}
    figures["degree_buckets"] = [{"from": 0, "to": 3, "share": 0.6}, {"from": 4, "to": 90, "share": 0.4}]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(expert_tables(figures))
    assert "All layers: 3 experts, 3 per row" in console.export_text()


def test_the_classes_are_a_row_of_blocks() -> None:
    layer = layer_figures(3, 4)
    layer["experts"][0] |= {"class_share": [0.5, 0.25, 0.25, 0.0]}
    layer["experts"][2] |= {"class_share": [0.0, 0.0, 0.0625, 0.9375 - 0.4375]}
    lines = printed(layer, num_classes=4)
    assert "█▄▄ " in next(line for line in lines if line.startswith("     0"))
    assert "  ▁█" in next(line for line in lines if line.startswith("     2"))


def test_blocks_of_named_classes_are_explained() -> None:
    figures = {
        "mixture": mixture_figures(), "layers": [layer_figures(3, 3)] * 2, "class_share": [1 / 3] * 3,
        "class_names": ["[b]owl", "cat", "a name of more than twenty letters"],
        "degree_buckets": [{"from": 0, "to": 3, "share": 0.6}, {"from": 4, "to": 90, "share": 0.4}],
    }  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(expert_tables(figures))
    assert "classes: 0 [b]owl, 1 cat, 2 a name of more than…\n" in console.export_text()


def test_what_has_no_value_is_a_dash() -> None:
    layer = layer_figures(1, 3, dead=0) | {"class_nmi": None, "closest_memories": None, "dead_experts": []}
    text = "\n".join(printed(layer, num_classes=3))
    assert "expert and class: – normalised" in text
    assert "closest" not in text
    assert "dead experts: none" in text
