"""The table of a plan."""

import re

import pytest
from rich.console import Console

from rbm_dist.config.run import Config
from rbm_dist.report.plan_table import duration, plan_table, size
from rbm_dist.sources.facts import SourceFacts
from rbm_dist.stages.plan import Hosts, make_plan


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (25e6, "25 MB"), (3.21e9, "3.2 GB")]
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (89, "89 s"), (90, "1.5 min"), (5400, "1.5 h"), (40_000, "11 h"), (864_000, "10 days")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def shown(memory: int) -> str:
    facts = SourceFacts(10_000, 80_000, 16, 4, 100, 50, True, note="published sizes of a graph")
    plan = make_plan(Config(run_dir="run"), facts, Hosts(1, memory, 4))
    console = Console(width=250)
    with console.capture() as capture:
        console.print(plan_table(plan.as_json()))
    return capture.get()


def test_a_plan_that_fits() -> None:
    text = shown(16 << 30)
    assert "10,000 nodes, 80,000 directed edges at most, 16 dense features" in text
    assert "(published sizes of a graph)" in text
    assert re.search(r"2 × teacher worker *│ *380 MB", text)
    assert "advised: partition.num_parts: 4 or more, 1 such host, up to 4 workers" in text
    assert text.rstrip().endswith("it fits")


def test_a_plan_that_does_not_fit() -> None:
    text = shown(900_000_000)
    assert "does not fit: source: needs " in text
    assert "larger hosts" in text
    assert "it fits" not in text
