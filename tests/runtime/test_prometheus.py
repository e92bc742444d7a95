"""Metrics as Ray's own exporter shows them; their names in the docs and in the dashboard."""

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from rbm_dist.runtime.placement import this_host
from rbm_dist.runtime.prometheus import METRICS, ExportedMetrics
from tests.patience import patient

ROOT = Path(__file__).parents[2]
FIGURES = {
    "rows_per_s": 1000.0, "edges_per_s": 20_000.0, "wait_share": 0.25, "expert_load": 1.5,
    "exchanged_bytes_per_s": 4096.0, "something_new": 1.0,
}  # fmt: skip


def status() -> dict[str, Any]:
    row = {"epoch": 1, "time": 5.0, "loss": 0.5, "val_accuracy": 0.75, "cache_hit_rate": 0.125}
    loop = {"done": 30, "total": 120, "unit": "steps", "left_s": 60.0, "epoch": 2, "figures": FIGURES}
    return {
        "stages": [
            {"name": "source", "state": "done", "seconds": 2.0},
            {"name": "teacher", "state": "at work", "seconds": 3.0},
            {"name": "evaluate", "state": "waiting", "seconds": None},
        ],
        "loops": {"teacher": {**loop, "last_epoch": row}},
        "checkpoint": {"loop": "teacher", "step": 25, "time": time.time() - 100},
    }


def exported(text: str) -> dict[tuple[str, str], float]:
    """Values by name and label, of this test's run."""
    found = {}
    for line in text.splitlines():
        sample = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', sample[2])) if sample else {}
        if sample and labels.get("run") == "s3://bucket/run":
            found[sample[1], labels.get("loop") or labels["stage"]] = float(sample[3])
    return found


def test_ray_exports_every_metric(cluster: None) -> None:
    node = next(each for each in ray.nodes() if each["NodeID"] == this_host())
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + patient(60)
    found: dict[tuple[str, str], float] = {}
    metrics = ExportedMetrics("s3://bucket/run")
    while {name for name, _ in found} != {f"ray_{name}" for name in METRICS}:
        assert time.monotonic() < deadline, METRICS.keys() - {name.removeprefix("ray_") for name, _ in found}
        metrics.publish(status())
        time.sleep(0.5)
        with urllib.request.urlopen(url, timeout=patient(10)) as answer:
            found |= exported(answer.read().decode())
    assert found["ray_rbm_dist_stage_state", "source"] == 2
    assert found["ray_rbm_dist_stage_state", "teacher"] == 1
    assert found["ray_rbm_dist_stage_state", "evaluate"] == 0
    assert found["ray_rbm_dist_progress_ratio", "teacher"] == 0.25
    assert found["ray_rbm_dist_epoch", "teacher"] == 2
    assert found["ray_rbm_dist_rows_per_second", "teacher"] == 1000
    assert found["ray_rbm_dist_exchanged_bytes_per_second", "teacher"] == 4096
    assert found["ray_rbm_dist_cache_hit_ratio", "teacher"] == 0.125
    assert 100 <= found["ray_rbm_dist_checkpoint_age_seconds", "teacher"] < 100 + patient(120)


def test_the_documented_names_are_those_that_are_exported() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"^\| `ray_(rbm_dist_\w+)`", text, re.MULTILINE)) == METRICS.keys()


def test_the_dashboard_asks_for_what_is_exported() -> None:
    board = json.loads((ROOT / "cluster" / "grafana" / "rbm-dist.json").read_text())
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    queries = [variables["run"]["query"]["query"]]
    places = set()
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        places |= {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        queries += [target["expr"] for target in panel["targets"]]
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in board["panels"]), (
        "none overlap"
    )
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert asked == {f"ray_{name}" for name in METRICS}
    assert all('run=~"$run"' in query for query in queries[1:])


@pytest.mark.parametrize("name", METRICS)
def test_names_have_their_unit(name: str) -> None:
    assert re.fullmatch(
        r"rbm_dist_[a-z_]+(_seconds|_ratio|_per_second|_state|_epoch|_loss)|rbm_dist_(epoch|loss)", name
    )
