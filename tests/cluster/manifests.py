"""The files of `cluster/`, read: every KubeRay manifest and every file for `ray up`, and the pods of the former."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
RAY_UP = sorted((ROOT / "cluster").glob("*/cluster.yaml"))
_CLUSTER_OF = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def read(path: Path) -> dict[str, Any]:
    """The one document of a file."""
    (document,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return document


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Ray cluster that a KubeRay manifest describes."""
    key = _CLUSTER_OF[manifest["kind"]]
    return manifest["spec"][key] if key else manifest["spec"]


def pods_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of its groups, the head first."""
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def all_pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the cluster, and the one that submits the job."""
    submitter = manifest["spec"].get("submitterPodTemplate")
    return [*pods_of(cluster_of(manifest)), *([submitter["spec"]] if submitter else [])]


def strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a document, each with where it is."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from strings(each, f"{path}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from strings(each, f"{path}.{index}")
    elif isinstance(value, str):
        yield path, value
