"""What a run's status says, as Prometheus metrics of the cluster: by Ray's own exporter, on the driver's node.

Ray puts `ray_` before each name. A value that is not set again is not exported again, so that the metrics of a driver
that is gone end with it.
"""

import time
from typing import Any

from ray.util.metrics import Gauge

_EVERY_S = 1.0

# name: what it is, and what it is told by beside the run
METRICS = {
    "rbm_dist_stage_state": ("0: to do, 1: at work, 2: done.", "stage"),
    "rbm_dist_stage_seconds": ("What a stage took, or has taken until now.", "stage"),
    "rbm_dist_progress_ratio": ("Units of a loop that are done, of all.", "loop"),
    "rbm_dist_time_left_seconds": ("What is left of a loop at its mean rate.", "loop"),
    "rbm_dist_epoch": ("The epoch that a training loop is in, from 0.", "loop"),
    "rbm_dist_rows_per_second": ("Rows that a training loop goes through, over all workers.", "loop"),
    "rbm_dist_edges_per_second": ("Edges that are sampled for them.", "loop"),
    "rbm_dist_loader_wait_ratio": ("Share of the time that workers wait for batches.", "loop"),
    "rbm_dist_exchanged_bytes_per_second": ("Sent among workers for experts, and to the routing memory.", "loop"),
    "rbm_dist_cache_hit_ratio": ("Rows of other hosts' nodes that were found in the cache, in the last epoch.", "loop"),
    "rbm_dist_expert_load_ratio": ("Rows of the busiest expert, over the mean of all.", "loop"),
    "rbm_dist_loss": ("Of the last epoch.", "loop"),
    "rbm_dist_val_accuracy_ratio": ("On validation nodes, after the last epoch.", "loop"),
    "rbm_dist_checkpoint_age_seconds": ("Since the last checkpoint was whole.", "loop"),
}

# by the names of heartbeats and of rows of `metrics.jsonl`
_FIGURES = {
    "rows_per_s": "rbm_dist_rows_per_second",
    "edges_per_s": "rbm_dist_edges_per_second",
    "wait_share": "rbm_dist_loader_wait_ratio",
    "exchanged_bytes_per_s": "rbm_dist_exchanged_bytes_per_second",
    "cache_hit_rate": "rbm_dist_cache_hit_ratio",
    "expert_load": "rbm_dist_expert_load_ratio",
    "loss": "rbm_dist_loss",
    "val_accuracy": "rbm_dist_val_accuracy_ratio",
}
_STATES = {"waiting": 0, "at work": 1, "done": 2}


class ExportedMetrics:
    """Sets every metric that is known, once a second at most."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(name, description, tag_keys=("run", label)) for name, (description, label) in METRICS.items()
        }
        self._run, self._at = run, float("-inf")

    def publish(self, status: dict[str, Any]) -> None:
        """`status`: as `report.status.RunStatus` has it."""
        if time.monotonic() - self._at < _EVERY_S:
            return
        self._at = time.monotonic()
        for stage in status["stages"]:
            self._set("rbm_dist_stage_state", stage["name"], _STATES.get(stage["state"]))
            self._set("rbm_dist_stage_seconds", stage["name"], stage["seconds"])
        for name, loop in status["loops"].items():
            self._set("rbm_dist_progress_ratio", name, loop["done"] / loop["total"] if loop["total"] else None)
            self._set("rbm_dist_time_left_seconds", name, loop["left_s"])
            self._set("rbm_dist_epoch", name, loop["epoch"])
            for figure, value in {**loop["last_epoch"], **loop["figures"]}.items():
                if figure in _FIGURES:
                    self._set(_FIGURES[figure], name, value)
        saved = status["checkpoint"]
        if saved:
            self._set("rbm_dist_checkpoint_age_seconds", saved["loop"], time.time() - saved["time"])

    def _set(self, name: str, label: str, value: float | None) -> None:
        if value is not None:
            self._gauges[name].set(value, tags={"run": self._run, METRICS[name][1]: label})
