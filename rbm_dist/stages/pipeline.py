"""The stages in order, and the loop that runs, skips or goes on with them."""

import contextlib
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.status import Status

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import disk_full
from rbm_dist.graph import encodings, feature_hops
from rbm_dist.graph.shards import ORIG_NAME, PER_ROW, SPARSE_FEAT
from rbm_dist.graph.shuffle import SPILL
from rbm_dist.report.metrics import MetricsWriter
from rbm_dist.report.progress import ProgressBars
from rbm_dist.report.source_table import source_table
from rbm_dist.report.status import RunStatus
from rbm_dist.runtime.cluster import is_own, ray_cluster
from rbm_dist.runtime.mailbox import Reporter, start_mailbox
from rbm_dist.runtime.progress import ProgressRelay
from rbm_dist.runtime.training import TrainingGroups
from rbm_dist.stages import encodings as encodings_
from rbm_dist.stages import evaluate, lease, soft_labels
from rbm_dist.stages import run as run_
from rbm_dist.stages.external_teacher import require_files
from rbm_dist.stages.feature_hops import reset_feature_hops
from rbm_dist.stages.inputs import check_input
from rbm_dist.stages.partition import run_partition
from rbm_dist.stages.run import Run, Stage
from rbm_dist.stages.source import run_source
from rbm_dist.stages.student import run_student
from rbm_dist.stages.teacher import run_teacher
from rbm_dist.stages.update import update_stages

_PER_ROW = "|".join((*PER_ROW, ORIG_NAME, *SPARSE_FEAT))

_PARTITION = Stage(
    "partition", "graph", ("partition",), run_partition,
    makes=rf"graph\.json|feat_(scale|scaling|indicators)\.npy|part-\d+|{SPILL}|"
    rf"({soft_labels.ARRAYS}|{encodings_.ARRAYS}|{feature_hops.ARRAYS})\.json",
)  # fmt: skip

STAGES = [
    Stage(
        "source", "source", ("source",), run_source, reader=_PARTITION,
        makes=rf"(indptr|indices|feat-\d+|feat_(scaling|indicators|moments)|{_PER_ROW})\.npy|(source|inputs)\.json|work",
    ),
    _PARTITION,
    Stage(
        "teacher", "teacher", ("teacher",), run_teacher, reset_feature_hops,
        makes=r"model\.safetensors|external\.json|checkpoints|ray_train",
    ),
    Stage(
        "soft_labels", "soft_labels", ("soft_labels",), soft_labels.run_soft_labels, soft_labels.reset_soft_labels,
        makes=r"unsmoothed\.json",
    ),
    Stage("encodings", "encodings", ("encodings",), encodings_.run_encodings, encodings_.reset_encodings),
    # With `encodings`: a run without that stage would otherwise not notice that they are wanted now.
    Stage(
        "student", "student", ("encodings", "student"), run_student, makes=r"mlp(_x\d+)?|ensemble|moe|rbm|ray_train"
    ),
    Stage("evaluate", "evaluate", (), evaluate.run_evaluate, makes=rf"figures\.json|{evaluate.WORK}"),
]  # fmt: skip


def run_stages(
    config: Config,
    console: Console,
    until: str = "evaluate",
    address: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> dict[str, Any] | None:
    """Bring a run up to a stage; finished stages are skipped. Gives the results once all stages are done.

    verify: read all that was written before, and compare checksums, rather than sizes and times of change.
    Raises `InputError` or `RunError`.
    """
    url = storage.absolute(config.run_dir)
    stages = all_stages(config)
    last = [stage.name for stage in stages].index(until)
    wanted = [stage for stage in stages_of(config) if stages.index(stage) <= last]
    run_.refuse_other_files(stages, url)
    with lease.held(url, console) as owner:
        run_.remove_temporary(stages, url)
        if overwrite:
            run_.discard_other_configuration(stages, config, url)
        run_.refuse_other_configuration(stages, config, url)
        check_input(stages[0], config, url, overwrite, console)
        try:
            _write_config(config, url)
            todo = _skip_done(wanted, url, console, verify)
            if any(stage.name == "teacher" for stage in todo):
                require_files(config)
            done = run_.seconds([stage for stage in wanted if stage not in todo], url)
            with RunStatus(url, {stage.name: done.get(stage.name) for stage in wanted}, asdict(owner)) as status:
                if todo:
                    _work(todo, config, url, console, address, owner.token, status)
            if todo:
                run_.remove_temporary(stages, url)  # again: a killed driver's workers end a little later than it
            return _results(url) if until == STAGES[-1].name else None
        except OSError as error:
            raise disk_full(error, str(error.filename or url)) or error from None


def all_stages(config: Config) -> list[Stage]:
    """The stages of a run, of which some may have nothing to do."""
    return STAGES if config.update is None else update_stages(STAGES)


def stages_of(config: Config) -> list[Stage]:
    """The stages that have something to do in a run."""
    return [stage for stage in all_stages(config) if stage.name != "encodings" or encodings.arrays(config.encodings)]


def _skip_done(stages: list[Stage], url: str, console: Console, verify: bool) -> list[Stage]:
    """The stages that still have work, after a line for each that has none."""
    upstream = None
    for index, stage in enumerate(stages):
        with console.status(f"{stage.name}: looking at what is there") as line:
            read = 0

            def show(size: int, stage: Stage = stage, line: Status = line) -> None:
                nonlocal read
                read += size
                line.update(f"{stage.name}: {read / 1e9:,.2f} GB read and compared")

            if run_.state(stage, url, upstream, show if verify else None) != "done":
                return stages[index:]
        verified = f", verified ({read / 1e9:,.2f} GB)" if verify else ""
        console.print(f"  [green]✓[/] {stage.name}: done before{verified}", highlight=False)
        upstream = run_.digest(stage, url)
    return []


def _work(
    stages: list[Stage], config: Config, url: str, console: Console, address: str | None, token: int, status: RunStatus
) -> None:
    every = stages_of(config)
    before = every.index(stages[0])
    upstream = run_.digest(every[before - 1], url) if before else None
    metrics = MetricsWriter(url)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(ray_cluster(config.cluster, address))
            bars = stack.enter_context(ProgressBars(console))
            mailbox = start_mailbox()
            # A Ray of our own has as many CPUs as are wanted.
            keep = is_own(address) and not config.cluster.use_gpu
            groups = stack.enter_context(TrainingGroups(config.cluster, Reporter(mailbox), keep))
            for stage in stages:
                state = run_.state(stage, url, upstream)
                if state != "done":
                    start = time.monotonic()
                    status.begin(stage.name)
                    if state == "new":
                        run_.begin(stage, config, url, upstream)
                    with ProgressRelay(mailbox, bars, metrics, status) as relay:
                        files = stage.work(Run(config, url, relay.reporter, token, groups))
                    spent = time.monotonic() - start
                    run_.finish(stage, url, files, spent)
                    metrics.flush()
                    resumed = " (went on from where it was)" if state == "started" else ""
                    console.print(f"  [green]✓[/] {stage.name}: {spent:.1f} s{resumed}", highlight=False)
                    if stage.name == "source" and config.update is None:
                        summary = storage.read_json(storage.join(url, "source", "source.json"))["summary"]
                        console.print(source_table(summary), highlight=False)
                status.finish(stage.name, run_.seconds([stage], url)[stage.name])
                upstream = run_.digest(stage, url)
    finally:
        metrics.close()


def _results(url: str) -> dict[str, Any]:
    """`results.json`: written when the last stage is done, read ever after."""
    path = storage.join(url, "results.json")
    figures = storage.read_json(storage.join(url, "evaluate", "figures.json"))
    results = {**figures, "seconds": run_.seconds(STAGES, url)}
    if not storage.exists(path) or storage.read_json(path) != results:
        storage.write_json(path, results)
    return results


def _write_config(config: Config, url: str) -> None:
    """Keep the whole configuration beside the results, for people."""
    storage.write_json(storage.join(url, "config.json"), config.model_dump(mode="json"))
