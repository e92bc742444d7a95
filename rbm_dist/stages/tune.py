"""A search for hyper-parameters at work: Ray Tune draws, runs and stops trials, one CPU each; files say what is done.

The same command again begins a new Tune search, which is told of the trials that ended (see `stages.trials`) and draws
those that are missing. Random draws belong to (seed, student, trial), so that an interruption changes none of them.
`<run_dir>/prepared/<hash>/` is a graph, its teacher and soft labels, for all trials that agree in what decides these;
one actor has each made once, whoever asks first. All are removed at the end.

A trial sees validation nodes alone. One whose training fails (it diverged, say) is counted, and said; if the first
ones of a student all fail, that is no matter of luck, and ends the search.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from rich.console import Console
from rich.markup import escape
from threadpoolctl import threadpool_limits

from rbm_dist import storage
from rbm_dist.config.experiment import prepared_hash
from rbm_dist.config.run import ClusterConfig, Config
from rbm_dist.config.tune import Candidate, Search
from rbm_dist.errors import InputError, RunError, disk_full
from rbm_dist.report.experiment import Row
from rbm_dist.report.progress import ProgressBars
from rbm_dist.report.tune import COLUMNS
from rbm_dist.runtime.cluster import ONE_THREAD, ray_cluster, spare_cpus
from rbm_dist.runtime.failures import explain
from rbm_dist.runtime.mailbox import start_mailbox
from rbm_dist.runtime.progress import ProgressRelay
from rbm_dist.runtime.search import Draws, refuse_missing_library, run_trials
from rbm_dist.runtime.worker_logs import warnings_of
from rbm_dist.stages import lease, local
from rbm_dist.stages.trials import begin, read_rows, refuse_other_files, write_results, write_row

_RETRIES = 3  # of a graph whose process was lost
_POLL_S = 1.0
_LOOKED_AT = 200  # draws that are looked at beforehand
_ALL_FAILED = 5  # first trials of a student; then the search ends


def run_search(
    search: Search, console: Console, address: str | None = None, jobs: int | None = None, overwrite: bool = False
) -> list[Row]:
    """Do the trials that are not done, at most `jobs` at once; write and give the rows of all that are done.

    Raises `InputError` or `RunError`; what was finished before is kept, and in the tables.
    """
    url = search.run_dir
    refuse_other_files(url)
    refuse_missing_library(search.settings.search == "tpe")
    for candidate in search.candidates:
        _look_ahead(search, candidate, console)
    with lease.held(url, console):
        begin(search, overwrite)
        rows = {each.name: read_rows(url, each.name, search.settings.trials) for each in search.candidates}
        try:
            if any(len(done) < search.settings.trials for done in rows.values()):
                _Work(search, rows, console, address, jobs).run()
        except OSError as error:
            raise disk_full(error, str(error.filename or url)) or error from None
        finally:
            write_results(search, _in_order(rows))
    return _in_order(rows)


def _in_order(rows: dict[str, dict[int, Row]]) -> list[Row]:
    return [done[number] for done in rows.values() for number in sorted(done)]


def _look_ahead(search: Search, candidate: Candidate, console: Console) -> None:
    """Say which share of the draws is impossible. Raises `InputError` if all are."""
    draws, reasons = Draws(candidate, search.config.seed, [], [], tpe=False), []
    for number in range(_LOOKED_AT):
        try:
            candidate.config(draws.at_random(number))
        except InputError as error:
            reasons.append(str(error))
    if len(reasons) == _LOOKED_AT:
        raise InputError(f"{candidate.name}: of {_LOOKED_AT} draws from its space none is possible: {reasons[0]}")
    if reasons:
        share = f"{len(reasons) / _LOOKED_AT:.0%} of the draws are impossible and will be drawn again"
        console.print(f"  {escape(candidate.name)}: {share}, such as: {escape(reasons[0])}", highlight=False)


class _Work:
    """The trials that are missing, one student after the other."""

    def __init__(
        self, search: Search, rows: dict[str, dict[int, Row]], console: Console, address: str | None, jobs: int | None
    ):
        self._search, self._rows, self._address, self._jobs = search, rows, address, jobs
        self._settings, self._url = search.settings, search.run_dir
        self._bars = ProgressBars(console)
        self._held: list[Row] = []  # failures of this student, while nothing else is there

    def run(self) -> None:
        cluster = ClusterConfig(train_workers=1, inference_workers=1)
        with ray_cluster(cluster, self._address), self._bars, ProgressRelay(start_mailbox(), self._bars):
            self._preparer = ray.remote(num_cpus=0)(_Preparer).remote(storage.join(self._url, "prepared"))
            missing = [each for each in self._search.candidates if len(self._rows[each.name]) < self._settings.trials]
            self._prepare(missing)
            self._show()
            for candidate in missing:
                self._of(candidate)
            local.remove_prepared(storage.join(self._url, "prepared"), set())

    def _prepare(self, candidates: list[Candidate]) -> None:
        """Make the graphs that are known to be needed; what is wrong with the input is found here."""
        configs = []
        for candidate in candidates:
            if candidate.shares_prepared:
                drawn = Draws(candidate, self._search.config.seed, [0], [], tpe=False).suggest("any")
                configs += [_of_seed(candidate.config(drawn["settings"]), seed) for seed in self._search.seeds]
        waiting = list({prepared_hash(config): config for config in configs}.values())
        running: list[Any] = []
        total, changed = len(waiting), time.monotonic()
        while waiting or running:
            while waiting and len(running) < (self._jobs or spare_cpus()):
                running += ray.get(self._preparer.begin.remote(waiting.pop()))
            self._bars.update("prepare", total - len(waiting) - len(running), total, "graphs")
            ready, running = ray.wait(running, num_returns=1, timeout=_POLL_S)
            if ready:
                changed = time.monotonic()
            elif time.monotonic() - changed > self._settings.timeout_s:
                raise RunError(f"no graph was prepared in {self._settings.timeout_s:g} s (timeout_s)")
            try:
                ray.get(ready)
            except RayError as error:
                raise explain(error, "preparing the graph") from None
        self._bars.finish("prepare")

    def _of(self, candidate: Candidate) -> None:
        search, settings = self._search, self._settings
        rows = self._rows[candidate.name]
        numbers = [number for number in range(settings.trials) if number not in rows]
        done = [rows[number] for number in sorted(rows)]
        self._held = []
        asha = settings.scheduler == "asha"
        work = partial(_train, candidate, search.seeds, self._preparer, asha, settings.timeout_s)
        run_trials(
            work, Draws(candidate, search.config.seed, numbers, done, settings.search == "tpe"), len(numbers), done,
            partial(self._ended, candidate), settings.grace_epochs if asha else None, self._jobs or spare_cpus(),
            settings.timeout_s,
        )  # fmt: skip

    def _ended(
        self, candidate: Candidate, number: int, drawn: dict[str, Any], figures: dict[str, Any] | None,
        curve: list[float], seconds: float,
    ) -> None:  # fmt: skip
        """Keep a trial that ended."""
        state = "stopped" if figures is None else "done" if figures["val"] is not None else "failed"
        row = dict.fromkeys(COLUMNS.names) | {
            "student": candidate.name, "trial": number, "state": state, "val_by_seed": [], "epochs": len(curve),
            **(figures or {}), "seconds": round(seconds, 3), "settings": drawn, "curve": curve,
        }  # fmt: skip
        if not candidate.repeats_prepared:
            for seed in self._search.seeds:
                config = _of_seed(candidate.config(drawn), seed)
                ray.get(self._preparer.forget.remote(config))
        rows = self._rows[candidate.name]
        if state == "failed":
            self._bars.print(f"  [yellow]![/] {escape(candidate.name)}, trial {number} failed: {escape(row['reason'])}")
        # Failures are kept once a trial did not fail: it may be the input, which can be mended.
        self._held.append(row)
        if rows or state != "failed":
            for each in self._held:
                write_row(self._url, each)
                rows[each["trial"]] = each
            self._held = []
        elif len(self._held) >= min(_ALL_FAILED, self._settings.trials):
            raise InputError(f"{candidate.name}: the first trials all failed; the last: {row['reason']}")
        found = f"{row['val']:.1%}" if row["val"] is not None else state
        self._show(f"{candidate.name} {number}: {found}")

    def _show(self, note: str = "") -> None:
        done = sum(map(len, self._rows.values()))
        self._bars.update("trials", done, self._settings.trials * len(self._rows), "trials", note)


def _of_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"seed": seed})


class _Preparer:
    """Has each graph made once, whoever asks, however many at once. An actor."""

    def __init__(self, url: str):
        self._url = url
        self._begun: dict[str, Any] = {}
        # Without a CPU of its own: who asks has one, and waits.
        task = ray.remote(num_cpus=0, max_retries=_RETRIES, runtime_env={"env_vars": ONE_THREAD})
        self._prepare = task(_prepare)

    def begin(self, config: Config) -> list[Any]:
        """What to wait for, in a list, or Ray would wait here; it gives the graph's URL."""
        name = prepared_hash(config)
        if name not in self._begun:
            self._begun[name] = self._prepare.remote(config, storage.join(self._url, name))
        return [self._begun[name]]

    def forget(self, config: Config) -> None:
        """Remove a graph that no other trial will need."""
        name = prepared_hash(config)
        if self._begun.pop(name, None) is not None:
            storage.remove(storage.join(self._url, name))


def _prepare(config: Config, url: str) -> str:
    torch.set_num_threads(1)
    with warnings_of("teacher"):
        local.prepare(config, url)
    return url


def _train(
    candidate: Candidate, seeds: tuple[int, ...], preparer: Any, each_epoch: bool, timeout_s: float,
    settings: dict[str, Any], report: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    """One trial: the mean validation accuracy over the seeds. Of the first seed every epoch is reported, if at all."""
    config, found = candidate.config(settings), []
    so_far = 0.0

    def on_epoch(row: dict[str, Any]) -> None:
        nonlocal so_far
        so_far = max(so_far, row["val_accuracy"])
        report(so_far)

    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), warnings_of(f"{candidate.name}, a trial"):
            for index, seed in enumerate(seeds):
                (ref,) = ray.get(preparer.begin.remote(_of_seed(config, seed)))
                prepared_url = ray.get(ref, timeout=timeout_s)
                with tempfile.TemporaryDirectory() as scratch:
                    heard = on_epoch if each_epoch and index == 0 else None
                    found.append(local.train_and_validate(_of_seed(config, seed), prepared_url, scratch, heard))
    except GetTimeoutError:
        raise RunError(f"no graph was prepared in {timeout_s:g} s (timeout_s)") from None
    except Exception as error:  # such as a loss that is not finite: these settings will not do
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, OSError | RayError):  # a full disk, say; a process or node that was lost
            raise
        text = str(cause) if isinstance(cause, InputError) else f"{type(cause).__name__}: {cause}"
        return {"val": None, "reason": " ".join(text.split())}
    vals = [figures["val"] for figures in found]
    costs = {name: found[0][name] for name in ("epochs", "parameters", "multiply_adds")}
    return {"val": statistics.fmean(vals), "val_by_seed": vals, **costs}
