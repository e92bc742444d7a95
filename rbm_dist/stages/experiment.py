"""An experiment at work: one Ray task per prepared graph and per student, one CPU each; tables at the end.

`<run_dir>/runs/<dataset>/<setting>/<student>/<objective>/seed-N.json` is one finished run, with the hash of the
configuration that made it: the same command again computes only what is missing or was made by another configuration.
`<run_dir>/prepared/<hash>/` is a graph, its teacher and soft labels, removed when the last of its students is trained.
On several machines the run directory lies on storage that all of them see.
"""

import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from rich.console import Console

from rbm_dist import __version__, storage
from rbm_dist.config.experiment import ExperimentConfig, Trial
from rbm_dist.config.run import ClusterConfig
from rbm_dist.config.source import OgbConfig
from rbm_dist.errors import InputError, RunError, disk_full
from rbm_dist.report.experiment import COLUMNS, Row, results_markdown, table_files, tidy
from rbm_dist.report.progress import ProgressBars
from rbm_dist.runtime.cluster import ONE_THREAD, ray_cluster, spare_cpus
from rbm_dist.runtime.failures import explain
from rbm_dist.runtime.mailbox import start_mailbox
from rbm_dist.runtime.progress import ProgressRelay
from rbm_dist.runtime.worker_logs import warnings_of
from rbm_dist.sources.ogb import ogb_folder
from rbm_dist.stages import lease, local

_RETRIES = 3  # of work lost with its node or process
_POLL_S = 1.0
_LIBRARIES = ("torch", "torch-geometric", "ray", "numpy", "scipy", "scikit-learn", "kaminpar")


def run_experiment(
    experiment: ExperimentConfig, trials: list[Trial], console: Console, address: str | None = None,
    jobs: int | None = None,
) -> list[Row]:  # fmt: skip
    """Do the runs that are not done, at most `jobs` at once; write and give the results of all that are done.

    Raises `InputError` or `RunError`, naming the run; what was finished before is kept, and in the tables.
    """
    url = storage.absolute(experiment.run_dir)
    _refuse_other_files(url)
    with lease.held(url, console):
        storage.remove_temporary(url, r"results\.(md|csv|parquet)")
        for folder in {_run_url(url, trial).rsplit("/", 1)[0] for trial in trials}:
            storage.remove_temporary(folder, r"seed-\d+\.json")
        unfinished = _unfinished(url, trials)
        absent = _absent_datasets(unfinished)
        for dataset, reason in absent.items():
            console.print(f"  [yellow]skipped[/] {dataset}: {reason}", highlight=False)
        if absent.keys() == {trial.dataset for trial in trials}:
            raise InputError("; ".join(f"{name}: {reason}" for name, reason in absent.items()))
        todo = [trial for trial in unfinished if trial.dataset not in absent]
        try:
            if todo:
                _work(experiment, url, todo, len(trials) - len(unfinished), console, address, jobs)
        except OSError as error:
            raise disk_full(error, str(error.filename or url)) or error from None
        finally:
            rows = write_tables(experiment, trials)
    return rows


def write_tables(experiment: ExperimentConfig, trials: list[Trial]) -> list[Row]:
    """Write `results.md`, `.csv` and `.parquet` of the runs that are done, also while others are at work."""
    url = storage.absolute(experiment.run_dir)
    _refuse_other_files(url)
    rows = [row for row in _rows(url, trials) if row is not None]
    notes = [f"**{name}** is skipped: {reason}." for name, reason in _absent_datasets(_unfinished(url, trials)).items()]
    if len(rows) < len(trials):
        notes.append(f"{len(rows):,} of {len(trials):,} runs are done; a figure of fewer than all seeds says how many.")
    facts = {
        "seeds": f"{len(experiment.seeds)} ({', '.join(map(str, experiment.seeds))})",
        "command": shlex.join(["rbm-dist", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join(
            [f"rbm-dist {__version__}", f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in _LIBRARIES]
        ),
        "hardware": f"{_processor()}; one thread per run",
    }
    files = table_files("results", tidy(rows))  # the .csv first: by it the others are known
    files["results.md"] = results_markdown(rows, len(experiment.seeds), notes, facts).encode()
    for name, content in files.items():
        with storage.atomic_writer(storage.join(url, name)) as stream:
            stream.write(content)
    return rows


def _refuse_other_files(url: str) -> None:
    """Raise `InputError` if tables that would be written over are not an experiment's."""
    for name in ("results.csv", "results.md", "results.parquet"):
        if not storage.is_file(storage.join(url, name)):
            continue
        fs, path = storage.filesystem(storage.join(url, "results.csv"))
        columns = fs.head(path, 4096).split(b"\n")[0].replace(b'"', b"").split(b",") if fs.isfile(path) else []
        if {b"dataset", b"student", b"objective", b"seed", b"config_hash"} - set(columns):
            raise InputError(f"{url}/{name}: is not an experiment's, and would be written over. Set another run_dir")


@dataclass
class _Group:
    """Students that learn from one prepared graph."""

    url: str
    trials: list[Trial] = field(default_factory=list)
    teacher: dict[str, Any] = field(default_factory=dict)  # its figures, once it is trained
    left: int = 0  # students to be trained


def _work(
    experiment: ExperimentConfig, url: str, todo: list[Trial], done: int, console: Console, address: str | None,
    jobs: int | None,
) -> None:  # fmt: skip
    groups = _groups(url, todo)
    with (
        ray_cluster(ClusterConfig(train_workers=1, inference_workers=1), address),
        ProgressBars(console) as bars,
        ProgressRelay(start_mailbox(), bars),  # shows warnings of the runs
    ):
        task = ray.remote(num_cpus=1, max_retries=_RETRIES, runtime_env={"env_vars": ONE_THREAD})
        prepare, train = task(_prepare), task(_train)
        waiting: deque[tuple[_Group, Trial | None]] = deque((group, None) for group in groups)  # None: to be prepared
        running: dict[Any, tuple[_Group, Trial | None]] = {}
        total, changed = done + len(todo), time.monotonic()
        bars.update("runs", done, total, "runs")
        while waiting or running:
            while waiting and len(running) < (jobs or spare_cpus()):
                group, trial = waiting.popleft()
                if trial is None:
                    ref = prepare.remote(group.trials[0], group.url)
                else:
                    ref = train.remote(trial, group.teacher, group.url, _run_url(url, trial))
                running[ref] = group, trial
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
            if not ready and time.monotonic() - changed > experiment.timeout_s:
                stuck = ", ".join((trial or group.trials[0]).id for group, trial in running.values())
                raise RunError(f"no run finished for {experiment.timeout_s:g} s (timeout_s); at work: {stuck}")
            for ref in ready:
                changed = time.monotonic()
                group, trial = running.pop(ref)
                result = _result(ref, trial or group.trials[0])
                if trial is None:
                    group.teacher = result
                    # Ahead of other graphs, so that few lie on disk at a time.
                    waiting.extendleft((group, each) for each in reversed(group.trials))
                    continue
                done, group.left = done + 1, group.left - 1
                bars.update("runs", done, total, "runs", f"{trial.id}: {result:.1%}")
                if not group.left:
                    storage.remove(group.url)


def _groups(url: str, todo: list[Trial]) -> list[_Group]:
    """The runs by the graph that they need; graphs that none needs are removed."""
    groups: dict[str, _Group] = {}
    for trial in todo:
        group = groups.setdefault(trial.prepared_hash, _Group(storage.join(url, "prepared", trial.prepared_hash)))
        group.trials.append(trial)
        group.left += 1
    local.remove_prepared(storage.join(url, "prepared"), set(groups))  # of another configuration, or cut off before
    return list(groups.values())


def _prepare(trial: Trial, prepared_url: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    with warnings_of(f"{trial.dataset}, teacher"):
        return local.prepare(trial.config, prepared_url)


def _train(trial: Trial, teacher: dict[str, Any], prepared_url: str, run_url: str) -> float:
    """Train one student and write its row. Gives the accuracy."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, warnings_of(trial.id):
        figures = local.train(trial.config, prepared_url, scratch)
    row = {
        **{name: getattr(trial, name) for name in ("dataset", "setting", "student", "objective", "seed")},
        **figures,
        "accuracy": _reported(figures),
        "teacher_val": teacher["val"],
        "teacher_accuracy": _reported(teacher),
        "teacher_confidence": teacher["confidence"],
        "config_hash": trial.config_hash,
    }
    storage.write_json(run_url, row)
    return row["accuracy"]


def _reported(figures: dict[str, Any]) -> float:
    """The accuracy that counts: over the unseen nodes in the inductive setting."""
    reported = figures["test"] if figures["unseen"] is None else figures["unseen"]
    if reported is None:
        raise InputError("the test split is empty: there is nothing to report")
    return reported


def _result(ref: Any, trial: Trial) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        failure = explain(error, trial.id)
        raise InputError(f"{trial.id}: {failure}") if isinstance(failure, InputError) else failure from None


def _run_url(url: str, trial: Trial) -> str:
    return storage.join(url, "runs", f"{trial.id}.json")


def _rows(url: str, trials: list[Trial]) -> list[Row | None]:
    """The row of each run; None where it is not done, or by another configuration."""

    def row(trial: Trial) -> Row | None:
        run_url = _run_url(url, trial)
        found = storage.read_json(run_url) if storage.exists(run_url) else {"config_hash": None}
        if not isinstance(found, dict) or "config_hash" not in found:
            raise InputError(f"{run_url}: is not an experiment's, and would be written over. Set another run_dir")
        whole = found.keys() >= set(COLUMNS.names)
        return found if whole and found["config_hash"] == trial.config_hash else None

    with ThreadPoolExecutor(max_workers=16) as pool:  # for object storage
        return list(pool.map(row, trials))


def _unfinished(url: str, trials: list[Trial]) -> list[Trial]:
    return [trial for trial, row in zip(trials, _rows(url, trials), strict=True) if row is None]


def _absent_datasets(trials: list[Trial]) -> dict[str, str]:
    """Datasets whose file or folder is not there, and why they are skipped."""
    absent: dict[str, str] = {}
    for trial in trials:
        source = trial.config.source
        keys = ("path", "nodes", "edges")
        paths = [ogb_folder(source)] if isinstance(source, OgbConfig) else [getattr(source, key, None) for key in keys]
        missing = [path for path in paths if path and "*" not in path and not storage.exists(path)]
        if missing:
            absent.setdefault(trial.dataset, f"no such file: {missing[0]}")
    return absent


def _processor() -> str:
    """Of the machine that the experiment was started on."""
    with suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if names:
            return f"{len(names)} × {names[0]}"
    return f"{os.cpu_count()} × {platform.machine()}"
