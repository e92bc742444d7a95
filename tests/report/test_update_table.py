"""What an update says of itself."""

import io
from typing import Any

from rich.console import Console

from rbm_dist.report.update_table import update_rows, update_table

FACTS: dict[str, Any] = {
    "run": "/runs/monday", "nodes_before": 1000, "nodes": 1010, "edges_before": 8000, "features": 0, "unknown": 2,
    "edges_given": 50, "added": 48, "drops_given": 6, "dropped": 6, "share": 0.0425, "reached": [10, 43, 505],
    "compared": 495, "other_class": 3, "largest_change": 0.25, "moved": 40, "kept": True, "anew": False,
}  # fmt: skip


def test_its_lines() -> None:
    rows = dict(update_rows(FACTS))
    assert rows["nodes"] == "1,000 → 1,010"
    assert rows["edges"] == ("48 in-edges new, 6 gone, of 8,000; 2 were there before; 2 to unknown nodes left out")
    assert rows["reached"].startswith("4.26%, 50.00% of the nodes")
    assert "of 495 that were there before, 3 name another class" in rows["soft labels"]
    assert "features" not in rows


def test_of_all_that_was_made_anew() -> None:
    rows = dict(update_rows(FACTS | {"anew": True, "features": 4}))
    assert "teacher and students trained anew" in rows["soft labels"]
    assert rows["features"] == "of 4 nodes replaced"
    assert dict(update_rows(FACTS | {"kept": False}))["soft labels"].startswith("all made anew; of 495")


def test_validation_before_and_after() -> None:
    before = {"teacher": {"val": 0.9}, "students": {"mlp": {"val": 0.8}}}
    after = {"teacher": {"val": 0.91}, "students": {"mlp": {"val": None}, "rbm": {"val": 0.7}}}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(update_table(FACTS, before, after))
    assert "teacher 90.0% → 91.0%, mlp 80.0% → –" in console.export_text()
