"""An experiment: datasets × settings × students × objectives × seeds, each cell a part of a run's configuration.

The parts are merged, key by key, in the order base < dataset < setting < student < objective < tuned, and validated as
a whole `Config` before anything is computed. Every refusal names the file, the key, the reason and the run.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rbm_dist import storage
from rbm_dist.config.fields import Count, Rate, Section
from rbm_dist.config.load import absolute, absolute_path, read_tree, refusals
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError

PREPARED = ("seed", "source", "partition", "teacher", "soft_labels", "encodings")
"""What decides the graph that a student learns from; students that agree in these share one."""

_HERE = {"run_dir", "seed", "cluster"}
_ONE_WORKER = {"train_workers": 1, "inference_workers": 1}  # trains each run


def _part_of_a_config(tree: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(tree.keys() - (Config.model_fields.keys() - _HERE))
    if unknown:
        raise PydanticCustomError("part", f"{', '.join(unknown)} is not a section that a part of an experiment sets")
    return tree


def _count_to_seeds(value: Any) -> Any:
    return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("seeds", "A seed occurs twice")
    return seeds


# They name files and stand in tables.
Name = Annotated[str, Field(pattern=r"^[\w+][\w+ .,=()-]*$")]
Tree = Annotated[dict[str, Any], AfterValidator(_part_of_a_config)]
Seed = Annotated[Count, Field(lt=2**31)]
Seeds = Annotated[
    tuple[Seed, ...], Field(min_length=1), BeforeValidator(_count_to_seeds), AfterValidator(_distinct)
]  # fmt: skip


class StudentPart(Section):
    """A student: a part of a configuration, and which objectives it is trained with."""

    model_config = ConfigDict(extra="allow")

    objectives: tuple[Name, ...] | None = Field(None, min_length=1, description="default: all")

    @property
    def tree(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _possible(self) -> Self:
        _part_of_a_config(self.tree)
        return self


class Tuned(Section):
    """What some cells set last. A name left out stands for all."""

    dataset: Name | None = None
    setting: Name | None = None
    student: Name | None = None
    objective: Name | None = None
    set: Tree

    def matches(self, names: tuple[str, str, str, str]) -> bool:
        wanted = (self.dataset, self.setting, self.student, self.objective)
        return all(want in (None, name) for want, name in zip(wanted, names, strict=True))


class ExperimentConfig(Section):
    """A whole experiment."""

    run_dir: str = Field(min_length=1, description="where everything is written; any fsspec URL")
    data_dir: str = Field(".", min_length=1, description="where relative paths of a source start")
    seeds: Seeds = Field((0,), description="a list, or how many from 0 on")
    timeout_s: Rate = Field(7200.0, description="longest wait for the next run to finish, in seconds")
    base: Tree = Field({})
    datasets: dict[Name, Tree] = Field(min_length=1)
    settings: dict[Name, Tree] = Field({"transductive": {}}, min_length=1)
    students: dict[Name, StudentPart] = Field(min_length=1)
    objectives: dict[Name, Tree] = Field({"KD": {}}, min_length=1)
    tuned: tuple[Tuned, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, student in self.students.items():
            for objective in student.objectives or ():
                self._known(f"students.{name}.objectives", "objective", objective)
        for index, cell in enumerate(self.tuned):
            for kind in ("dataset", "setting", "student", "objective"):
                if getattr(cell, kind) is not None:
                    self._known(f"tuned.{index}.{kind}", kind, getattr(cell, kind))
        return self

    def _known(self, key: str, kind: str, name: str) -> None:
        names = getattr(self, f"{kind}s")
        if name not in names:
            raise ValueError(f"{key}: no {kind} is named '{name}'; there are {', '.join(names)}")


@dataclass(frozen=True)
class Trial:
    """One run of an experiment: one student, trained once."""

    dataset: str
    setting: str
    student: str
    objective: str
    config: Config
    written: Config  # with paths as they were given: results are known again wherever the files lie

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def id(self) -> str:
        """Its place below `runs/`."""
        return f"{self.dataset}/{self.setting}/{self.student}/{self.objective}/seed-{self.seed}"

    @cached_property
    def config_hash(self) -> str:
        """Of all that decides the result."""
        return _hash(self.written, (*PREPARED, "student"))

    @cached_property
    def prepared_hash(self) -> str:
        return prepared_hash(self.written)


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> tuple[ExperimentConfig, list[Trial]]:
    """Read an experiment's YAML file and apply `key=value` overrides; gives it and its runs, seed by seed.

    Raises `InputError` naming the file, the key and the reason, for any of its runs.
    """
    tree, overridden = read_tree(path, overrides)
    try:
        experiment = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(refusals(error, str(path), overridden))) from None
    trials = _trials(experiment, str(path))
    places = {name: absolute_path(getattr(experiment, name)) for name in ("run_dir", "data_dir")}
    return experiment.model_copy(update=places), trials


def merge(*trees: dict[str, Any]) -> dict[str, Any]:
    """Trees laid over each other, key by key; the last one wins."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def _trials(experiment: ExperimentConfig, path: str) -> list[Trial]:
    trials: list[Trial] = []
    refused: dict[str, list[str]] = {}
    for names, tree in _cells(experiment):
        try:
            config = Config.model_validate({**tree, "run_dir": experiment.run_dir, "cluster": _ONE_WORKER})
        except ValidationError as error:
            for message in refusals(error, path, []):
                refused.setdefault(message, []).append(" × ".join(names))
            continue
        if len(config.student.models) > 1:
            message = f"{path}: student.models: a run trains one student, found {', '.join(config.student.models)}"
            refused.setdefault(message, []).append(" × ".join(names))
        found = absolute(config)
        for seed in experiment.seeds:
            trials.append(Trial(*names, *(each.model_copy(update={"seed": seed}) for each in (found, config))))
    if refused:
        more = {message: f" and {len(cells) - 1} more" if cells[1:] else "" for message, cells in refused.items()}
        raise InputError("\n".join(f"{text} (in {cells[0]}{more[text]})" for text, cells in refused.items()))
    return sorted(trials, key=lambda trial: experiment.seeds.index(trial.seed))


def _cells(experiment: ExperimentConfig) -> list[tuple[tuple[str, str, str, str], dict[str, Any]]]:
    """The names and the merged tree of every cell."""
    cells = []
    for dataset, of_dataset in experiment.datasets.items():
        for setting, of_setting in experiment.settings.items():
            for student, part in experiment.students.items():
                for objective in part.objectives or experiment.objectives:
                    names = (dataset, setting, student, objective)
                    tuned = [each.set for each in experiment.tuned if each.matches(names)]
                    of_objective = experiment.objectives[objective]
                    tree = merge(experiment.base, of_dataset, of_setting, part.tree, of_objective, *tuned)
                    cells.append((names, _at_data_dir(tree, experiment.data_dir)))
    return cells


def _at_data_dir(tree: dict[str, Any], data_dir: str) -> dict[str, Any]:
    source = tree.get("source")
    for key in ("path", "root", "nodes", "edges"):
        path = source.get(key) if isinstance(source, dict) else None
        if isinstance(path, str) and "://" not in path and path[:1] not in ("/", "~"):
            tree = merge(tree, {"source": {key: storage.join(data_dir, path)}})
    return tree


def prepared_hash(config: Config) -> str:
    """Of all that decides the graph that the student learns from."""
    return _hash(config, PREPARED)


def _hash(config: Config, sections: tuple[str, ...]) -> str:
    tree = config.model_dump(mode="json")
    text = json.dumps({section: tree[section] for section in sections}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
