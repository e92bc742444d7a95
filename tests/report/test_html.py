"""The page of a report, read back by the standard library's parser: all figures, nothing from outside, all escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist import storage
from rbm_dist.report.charts import dot_chart, svg, thinned
from rbm_dist.report.html import is_report, report_page
from tests.report.layer import layer_figures, mixture_figures

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$x_{", "_under & over", "\x00\u202e\n"]


class Page(HTMLParser):
    """Tags with their attributes, the cells of every table, and all text but the style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text, self._open = "", ""
        self.depth: list[str] = []  # of tags that are open
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.depth.append(tag)
        self._open = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag, "tags are nested"
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open != "style":
            self.text += data
        if self._open in ("th", "td"):
            self.tables[-1][-1][-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the table whose header begins so."""
        [found] = [rows for rows in self.tables if rows and tuple(rows[0][: len(header)]) == header]
        return found


def facts(
    classes: int = 3, experts: int = 4, epochs: int = 5, names: list[str] | None = None, layers: int = 1
) -> dict[str, Any]:
    """What `stages.report.run_facts` would have of some run."""
    rng = np.random.default_rng(0)
    models = ("majority", "regression", "teacher", "mlp", "rbm")
    shown = names or [str(cls) for cls in range(classes)]
    accuracy = {model: {"val": 0.5 + 0.05 * at, "test": 0.4 + 0.05 * at} for at, model in enumerate(models)}
    load = [rng.dirichlet(np.ones(experts)).tolist() for _ in range(layers)]
    mixture = mixture_figures() | {"expert_load": load, "effective_experts": [experts * 0.9] * layers}
    rows = [
        {"epoch": epoch, "loss": loss, "val_loss": 1 + loss, "val_accuracy": 1 - loss}
        for epoch, loss in enumerate(np.exp(-np.linspace(0.5, 9, epochs)).tolist())
    ]
    return {
        "url": "/runs/one", "finished": 1.8e9, "made_by": ["0.1.0"], "versions": {"torch": "2.13.0"},
        "results": {
            "baselines": {name: accuracy[name] for name in models[:2]}, "teacher": accuracy["teacher"],
            "students": {"mlp": accuracy["mlp"], "rbm": accuracy["rbm"] | {"mixture": mixture}},
            "latency_us": {"teacher": {"1": 900.0, "1024": 20.0}, "mlp": {"1": 20.0, "1024": 0.5},
                           "rbm": {"1": 30.0, "1024": 0.75}},
            "seconds": {"source": 1.5, "teacher": 20.25, "evaluate": 4.0}, "class_names": names,
            "classes": [
                {"name": name, "nodes": 10 * cls, "accuracy": dict.fromkeys(models, cls / classes if cls else None)}
                for cls, name in enumerate(shown)
            ],
        },
        "config": {"seed": 3, "source": {"kind": "tables", "label": "<b>"}, "student": {"models": ["mlp", "rbm"]}},
        "graph": {"num_nodes": 1234, "num_edges": 5678, "num_features": 9, "num_classes": classes, "offsets": [0, 1234],
                  "sparse_features": False, "partition": {"cut_share": 0.25}},
        "summary": {
            "nodes": {"rows": 1234, "from": "a & b.csv"}, "ids": "column <id>", "edges": {"from": "e", "kept": 5678},
            "label": {"from": "column y", "unlabelled": 7, "classes": [{"name": name, "nodes": 100} for name in shown]},
            "split": {"from": "drawn", "train": 60, "val": 90, "test": 1000, "unseen": 0},
            "features": [{"name": "<f>", "type": "float", "min": 0.0, "max": 1.0, "missing": 0}], "scaled": "",
            "left_out": [{"what": "column <z>", "why": "no & use"}], "warnings": ["column <w> tells nothing"],
        },
        "experts": {
            "num_nodes": 1234, "class_names": names, "class_share": [1 / classes] * classes,
            "layers": [layer_figures(experts, classes) for _ in range(layers)],
        },
        "loops": {"teacher": rows, "rbm": rows}, "chosen": {"teacher": epochs - 1, "rbm": None},
        "planned": {"source": 6.0, "teacher": 100.0, "evaluate": 9.0}, "plan_note": "on 2 cores",
    }  # fmt: skip


def test_every_figure_is_in_its_table() -> None:
    page = Page(report_page(facts()))
    assert page.depth == []
    assert page.table("model", "val")[-1] == ["RbM", "70.0 %", "60.0 %", "30.0", "0.8", "yes"]
    assert page.table("class", "test nodes")[1:] == [
        ["0", "0", "–", "–", "–", "–"], ["1", "10", *["33.3 %"] * 4], ["2", "20", *["66.7 %"] * 4],
    ]  # fmt: skip
    assert page.table("model", "batch of 1")[1] == ["teacher (GraphSAGE)", "900.0", "20.0"]
    assert page.table("stage")[1:] == [
        ["source", "1.5 s", "6 s"], ["teacher", "20.2 s", "1.7 min"], ["evaluate", "4.0 s", "9 s"],
        ["total", "25.8 s", "1.9 min"],
    ]  # fmt: skip
    assert page.table("RbM", "val")[2] == ["averaged into one", "60.1 %", "60.0 %"]
    assert ["student.models", '["mlp", "rbm"]'] in page.table("seed")
    said = ("1,234 nodes", "5,678 directed", "torch 2.13.0", "30.0 ×", "RbM is weakest on: 1 (33.3 %)", "on 2 cores")
    for text in said:
        assert text in page.text
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == len(set(charts)) == 9, "each chart has a name of its own"
    assert "Training of teacher, 5 epochs" in charts


def test_a_page_needs_nothing_from_outside_and_has_each_id_once() -> None:
    page = Page(report_page(facts(layers=2)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith("data:image/png") or value[1:] in ids, f"{name} of {tag}"
            for target in re.findall(r"url\(#(\w+)\)", value or ""):
                assert target in ids


def test_what_users_named_is_text_and_nothing_else() -> None:
    given = facts(classes=5, names=HOSTILE)
    given["url"] = "/runs/</title><script>"
    page = Page(report_page(given))
    plain = Page(report_page(facts(classes=5)))
    html = {"a", "dd", "details", "div", "dt", "figure", "img", "li", "meta", "script", "svg", "td", "th"}
    assert [tag for tag, _ in page.tags if tag in html] == [tag for tag, _ in plain.tags if tag in html]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    rows = page.table("class", "test nodes")
    assert [row[0] for row in rows[1:]] == [*HOSTILE[:4], "   "]
    assert "column <id>" in page.text
    assert "column <z> (no & use)" in page.text


def test_a_large_run_makes_a_small_page() -> None:
    names = [f"class number {cls} with a long name <&>" for cls in range(172)]
    content = report_page(facts(classes=172, experts=64, epochs=20_000, names=names, layers=3))
    assert len(content.encode()) < 1_000_000
    page = Page(content)
    assert len(page.table("class", "test nodes")) == 173
    assert "of 171 classes the 24 on which RbM is weakest are drawn" in page.text


def test_a_thinned_curve_keeps_its_peaks_and_its_end() -> None:
    curve_P2 = np.stack([np.arange(20_000.0), np.sin(np.arange(20_000.0))], axis=1)
    curve_P2[12_345, 1], curve_P2[7_001, 1] = 5.0, -5.0
    thin_P2 = thinned(curve_P2)
    assert len(thin_P2) <= 301
    assert np.all(np.diff(thin_P2[:, 0]) > 0)
    assert {(12_345.0, 5.0), (7_001.0, -5.0)} <= set(map(tuple, thin_P2))
    assert tuple(thin_P2[-1]) == tuple(curve_P2[-1])
    assert len(thinned(curve_P2[:300])) == 300


def test_what_a_run_does_not_have_is_said() -> None:
    given = facts()
    del given["results"]["students"]["rbm"]
    for name in ("classes", "baselines"):
        del given["results"][name]
    given |= {"experts": None, "loops": {}, "planned": None, "plan_note": "gone <away>", "summary": None}
    page = Page(report_page(given))
    assert "has no student rbm" in page.text
    assert "made by an earlier version" in page.text
    assert "no metrics.jsonl" in page.text
    assert "gone <away>" in page.text
    assert page.table("stage")[1] == ["source", "1.5 s", "–"]
    assert "its summary is not there" in page.text


def test_no_node_to_test_on() -> None:
    given = facts(names=["a", "b", "c"])
    for each in given["results"]["classes"]:
        each |= {"nodes": 0, "accuracy": dict.fromkeys(each["accuracy"])}
    for each in [given["results"]["teacher"], *given["results"]["students"].values()]:
        each["test"] = None
    page = Page(report_page(given))
    assert [row[2] for row in page.table("class", "test nodes")[1:]] == ["–"] * 3


def test_a_charts_text_is_text() -> None:
    chart = svg(dot_chart([("_a <b>", {"c $x$": 0.5, "d": None})], "share"), 'a "name"')
    assert Page(chart).tags[0][1]["aria-label"] == 'a "name"'
    for text in ("_a &lt;b&gt;", ">c $x$<", ">50 %<"):
        assert text in chart
    assert "#0a0b0c" not in chart


def test_a_report_is_known_by_its_mark(url: str, tmp_path: Path) -> None:
    assert not is_report(f"{url}/page.html")
    for content, known in ((report_page(facts()), True), ("<html>mine</html>", False), ("", False)):
        with storage.atomic_writer(f"{url}/page.html") as stream:
            stream.write(content.encode())
        assert is_report(f"{url}/page.html") is known
    assert not is_report(str(tmp_path))


@pytest.mark.parametrize("unseen", [None, 0.5])
def test_unseen_nodes_come_first_where_there_are_some(unseen: float | None) -> None:
    given = facts()
    for each in [given["results"]["teacher"], *given["results"]["students"].values()]:
        each["unseen"] = unseen
    for each in given["results"]["baselines"].values():
        each["unseen"] = unseen
    assert ("of unseen nodes right" in Page(report_page(given)).text) is (unseen is not None)
