"""Ray Tune at work for one student: what it draws, which trials it stops, and what is told of each that ends.

Tune's own files and output are switched off: a search is gone on with by telling a new one of the trials that ended.
"""

import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.variant_generator import generate_variants

from rbm_dist.config.tune import Candidate, Range
from rbm_dist.errors import InputError, RunError
from rbm_dist.randomness.bits import key
from rbm_dist.randomness.words import Word
from rbm_dist.report.experiment import Row
from rbm_dist.runtime.failures import explain

Work = Callable[[dict[str, Any], Callable[[float], None]], dict[str, Any]]
"""A trial: gets its `settings` and what to call with the highest validation accuracy after each epoch; gives figures.

`val` among these is what counts; None if the trial failed.
"""
Ended = Callable[[int, dict[str, Any], dict[str, Any] | None, list[float], float], None]
"""Is told of a trial that ended: number, settings, figures (None if it was stopped), accuracy by epoch, seconds."""

_VAL = "val_accuracy"  # what Tune maximises
_RETRIES = 3  # of a trial whose process was lost
_ATTEMPTS = 1000  # to draw a possible configuration
_NO_END = 10**6  # epochs: trials end by themselves
# No handler of Ctrl-C, no files of results, no snapshots, and no tables, which the newer output has at any verbosity.
_QUIET = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}  # fmt: skip


class Draws(Searcher):
    """The configurations of trials: at random, by (seed, student, trial) alone, or by TPE from the trials before.

    One that is impossible is drawn again: every student gets as many trials that can be done.
    """

    def __init__(self, candidate: Candidate, seed: int, numbers: list[int], done: list[Row], tpe: bool):
        super().__init__(metric=_VAL, mode="max")
        self._candidate, self._seed, self._numbers = candidate, seed, iter(numbers)
        # Of a list the index, as TPE chooses among plain values only.
        self._space = {name: _domain(domain) for name, domain in candidate.space.items()}
        self._asked: dict[str, str] = {}  # by Tune's name of a trial, that of the draw
        self._tpe: Any = None
        if tpe:
            self._tpe = _tpe(self._space, key(seed, *candidate.name.encode(), len(done)) % 2**32)
            for row in done:
                self._tpe.add_evaluated_point(self._drawn(row["settings"]), _score(row))

    def suggest(self, trial_id: str) -> Any:
        """The number and settings of the next trial, which are possible. Raises `InputError` if none is found."""
        number = next(self._numbers, None)
        if number is None:
            return Searcher.FINISHED
        reason = ""
        for attempt in range(_ATTEMPTS):
            name = f"{trial_id}-{attempt}"
            drawn = self._tpe.suggest(name) if self._tpe else None
            settings = self._settings(drawn) if drawn else self.at_random(number, attempt)
            try:
                self._candidate.config(settings)
            except InputError as error:
                reason = str(error)
                if self._tpe:
                    self._tpe.on_trial_complete(name, error=True)
                continue
            self._asked[trial_id] = name
            return {"trial": number, "settings": settings}
        raise InputError(f"{self._candidate.name}: of {_ATTEMPTS:,} draws none is possible; the last: {reason}")

    def at_random(self, number: int, attempt: int = 0) -> dict[str, Any]:
        """The settings of a trial at random, possible or not."""
        words = (self._seed, Word.TRIAL, *self._candidate.name.encode(), number, attempt)
        ((_, drawn),) = generate_variants(self._space, random_state=np.random.RandomState(key(*words) % 2**32))
        return self._settings(drawn)

    def _settings(self, drawn: dict[str, Any]) -> dict[str, Any]:
        domains = self._candidate.space
        return {
            name: drawn[name] if isinstance(domain, Range) else domain[drawn[name]] for name, domain in domains.items()
        }

    def _drawn(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What `_settings` makes these of."""
        drawn = {}
        for name, value in settings.items():
            domain = self._candidate.space[name]
            drawn[name] = value if isinstance(domain, Range) else [_plain(each) for each in domain].index(_plain(value))
        return drawn

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._tpe and trial_id in self._asked:
            self._tpe.on_trial_complete(self._asked.pop(trial_id), result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to be kept: the trials are."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def refuse_missing_library(tpe: bool) -> None:
    """Raise `InputError` if TPE is asked for and its library is not installed."""
    if tpe and importlib.util.find_spec("optuna") is None:
        raise InputError("search: tpe needs optuna: pip install 'rbm-dist[tune]', or set search: random")


def run_trials(
    work: Work, draws: Draws, trials: int, done: list[Row], ended: Ended, grace_epochs: int | None, jobs: int,
    timeout_s: float,
) -> None:  # fmt: skip
    """Do as many trials, at most `jobs` at once; `grace_epochs`: stop by ASHA after so many, None: stop none.

    Raises what `ended` raises, and `RunError` if no trial reports for `timeout_s`, or one loses its process too often.
    """
    os.environ |= _QUIET
    scheduler = _asha(grace_epochs, done) if grace_epochs else FIFOScheduler()

    def trial(sampled: dict[str, Any]) -> None:
        epochs = itertools.count(1)
        figures = work(sampled["settings"], lambda best: tune.report({_VAL: best, "epoch": next(epochs)}))
        tune.report({_VAL: figures["val"] or 0.0, "figures": figures})

    follower = _Follower(ended, timeout_s)
    with tempfile.TemporaryDirectory() as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=draws, scheduler=scheduler, num_samples=trials, max_concurrent_trials=jobs,
                reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=scratch, verbose=0, callbacks=[follower],
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
            ),
        )  # fmt: skip
        tuner.fit()


class _Follower(tune.Callback):
    """Hands trials that end to `ended`. What that raises waits for a moment at which Tune lets it through."""

    def __init__(self, ended: Ended, timeout_s: float):
        self._ended, self._timeout_s = ended, timeout_s
        self._curves: dict[str, list[float]] = {}
        self._error: BaseException | None = None
        self._changed = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks down, for who would restore them

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._changed = time.monotonic()
        if "epoch" in result:  # of a trial that was begun again, too
            curve = self._curves.get(trial.trial_id, [])
            self._curves[trial.trial_id] = [*curve[: result["epoch"] - 1], result[_VAL]]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._changed = time.monotonic()
        result, sampled = trial.last_result, trial.config
        curve = self._curves.pop(trial.trial_id, [])
        try:
            self._ended(
                sampled["trial"], sampled["settings"], result.get("figures"), curve, result.get("time_total_s", 0.0)
            )
        except BaseException as error:
            self._error = self._error or error

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        cause = trial.get_pickled_error() or trial.get_error() or RuntimeError("lost")
        self._error = self._error or explain(cause, f"trial {trial.config['trial']}")

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._error is not None:
            raise self._error
        if time.monotonic() - self._changed > self._timeout_s:
            stuck = ", ".join(str(each.config["trial"]) for each in trials if each.status == "RUNNING")
            raise RunError(f"no trial came to an end for {self._timeout_s:g} s (timeout_s); at work: {stuck or 'none'}")


def _asha(grace_epochs: int, done: list[Row]) -> TrialScheduler:
    """ASHA that has seen the trials that are done."""
    scheduler = ASHAScheduler("epoch", _VAL, "max", max_t=_NO_END, grace_period=grace_epochs, stop_last_trials=False)
    for row in done:
        trial = SimpleNamespace(trial_id=f"done-{row['trial']}")
        scheduler.on_trial_add(None, trial)
        for epoch, best in enumerate(row["curve"], start=1):
            scheduler.on_trial_result(None, trial, {"epoch": epoch, _VAL: best})
    return scheduler


def _tpe(space: dict[str, Any], seed: int) -> Any:
    import optuna  # an extra
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(OptunaSearch.convert_search_space(space), metric=_VAL, mode="max", seed=seed)


def _domain(domain: Range | tuple[Any, ...]) -> Any:
    if not isinstance(domain, Range):
        return tune.choice(list(range(len(domain))))
    low, high = domain.bounds
    if domain.integer:
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if domain.log else tune.uniform(low, high)


def _plain(value: Any) -> Any:
    """A value as it is read back from a file of JSON."""
    return json.loads(json.dumps(value))


def _score(row: Row) -> float:
    """What a search is told: of a trial that was stopped, where it was; one that failed is as bad as can be."""
    return max(row["curve"]) if row["state"] == "stopped" else row["val"] or 0.0
