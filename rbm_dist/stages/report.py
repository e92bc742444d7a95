"""What is known of a finished run, gathered from its own files for `rbm-dist report`; needs neither Ray nor a GPU.

Reads all nodes once where the run has an RbM, as `inspect` does, and asks the source for its size, as `plan` does.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.report.metrics import Row, read_metrics
from rbm_dist.serve.experts import ARRAYS, expert_figures
from rbm_dist.sources.facts import source_facts
from rbm_dist.stages import run as run_
from rbm_dist.stages.finished import open_mixture, open_results
from rbm_dist.stages.pipeline import STAGES
from rbm_dist.stages.plan import make_plan, these_hosts
from rbm_dist.stages.update import update_facts

_PACKAGES = ("rbm-dist", "torch", "torch-geometric", "ray", "numpy", "scipy", "scikit-learn", "numba", "kaminpar")


def run_facts(url: str) -> dict[str, Any]:
    """The facts that `report.html.report_page` shows; what a run does not have is None.

    `results` as in `results.json`; `experts` as in `inspect.json`; `loops`, the rows of `metrics.jsonl` by loop, and
    `chosen`, the epoch that each loop's weights are from; `planned`, seconds by stage, or `plan_note`, why there are
    none; `config`, `graph` (of `graph.json`), `summary` (of the source), `update` (what has changed since another run),
    `versions` of packages, `finished` in seconds since 1970. Raises `InputError` if that is no run, one that has not
    finished, or damaged.
    """
    url = storage.absolute(url)
    try:
        results = open_results(url)
        config = storage.read_json(storage.join(url, "config.json"))
        models = ("teacher", *results["students"])
        loops = {name: rows for name, rows in read_metrics(url).items() if name.split("/")[0] in models}
        by_loss = config["teacher"].get("select") == "loss"
        manifests = [each for each in (run_.manifest(stage, url) for stage in STAGES) if each is not None]
        facts = {
            "url": url,
            "results": results,
            "config": config,
            "graph": _verified(url, "partition", "graph/graph.json"),
            "summary": (_verified(url, "source", "source/source.json") or {}).get("summary"),
            "update": update_facts(url) if config.get("update") else None,
            "loops": loops,
            "chosen": {name: chosen_epoch(rows, by_loss and name == "teacher") for name, rows in loops.items()},
            "finished": max(each["finished"] for each in manifests),
            "made_by": sorted({each["rbm_dist"] for each in manifests}),
            "versions": _versions(),
        }
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{url}: a config.json or manifest.json there was changed, or written by another version of rbm-dist"
        ) from None
    planned, note = _planned(config, url)
    experts = _experts(url) if "rbm" in results["students"] else None
    return facts | {"experts": experts, "planned": planned, "plan_note": note}


def chosen_epoch(rows: list[Row], by_loss: bool) -> int | None:
    """The epoch whose weights were kept, by the rule of the stages: the first of the best; None if it is not known."""
    known = [row for row in rows if {"val_loss", "val_accuracy"} <= row.keys()]
    if not known or len(known) < len(rows):
        return None
    score = {
        row["epoch"]: -row["val_loss"] if by_loss else row["val_accuracy"] - 1e-9 * row["val_loss"] for row in known
    }
    return max(score, key=lambda epoch: score[epoch])


def _experts(url: str) -> dict[str, Any]:
    mixture, _, store, _ = open_mixture(url, ARRAYS)
    return expert_figures(mixture, store, mixture.inputs)


def _verified(url: str, stage: str, name: str) -> Any:
    """A JSON file that a stage wrote, compared with its checksum; None where it wrote none, or its folder is gone."""
    done = next(run_.manifest(each, url) for each in STAGES if each.name == stage)
    if done is None or name not in done["files"]:
        return None
    storage.verify(url, {name: done["files"][name]})
    return storage.read_json(storage.join(url, name))


def _planned(tree: dict[str, Any], url: str) -> tuple[dict[str, float] | None, str]:
    """Seconds by stage as `rbm-dist plan` has them on this machine, and from what; None and why, if there are none."""
    try:
        config = Config.model_validate(tree)
    except ValueError:
        return None, "not predicted: the configuration is another version's"
    if config.update is not None:
        return None, "not predicted: the run goes on from another"
    try:
        facts = source_facts(config.source, config.seed)
    except (InputError, OSError, ImportError) as error:
        return None, f"not predicted, as the source cannot be read any more: {error}"
    gpus = config.cluster.most_workers if config.cluster.use_gpu else 0
    hosts = these_hosts(url, 1, None, None, gpus)
    plan = make_plan(config, facts, hosts)
    cores = f"{hosts.cores} core{'s' * (hosts.cores > 1)}"
    note = f"Predicted: what rbm-dist plan says of this configuration on the machine that made this page ({cores})."
    return {stage.name: stage.seconds for stage in plan.stages}, note


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder, not installed
            continue
    return found
