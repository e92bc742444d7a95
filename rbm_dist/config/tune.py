"""A search for hyper-parameters: which keys, among which values, for which students, in how many trials.

CONFIG, a run's configuration, is what all trials share; SPACE, a file of `SearchConfig`, says what differs. A key that
does not exist, a value that its key can never have and a student without a possible configuration are refused before
anything is computed; what is impossible only together with other values is for the search to draw again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rbm_dist.config.experiment import PREPARED, Name, Seeds, merge
from rbm_dist.config.fields import NUMBER, Positive, Rate, Section
from rbm_dist.config.load import absolute, absolute_path, flatten, read_tree, refusals
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError

SECTIONS = ("teacher", "soft_labels", "encodings", "student")
"""What a search may set. Others say what the task is, or how it is carried out."""

_Number = Annotated[float, NUMBER]


class Range(Section):
    """Numbers between two bounds, drawn evenly, or evenly on a logarithmic scale."""

    uniform: tuple[_Number, _Number] | None = None
    log: tuple[_Number, _Number] | None = None
    integer: tuple[Annotated[int, NUMBER], Annotated[int, NUMBER]] | None = Field(None, description="both included")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sum(bounds is not None for bounds in (self.uniform, self.log, self.integer)) != 1:
            raise PydanticCustomError("range", "Name one of uniform, log and integer")
        low, high = self.bounds
        if low >= high:
            raise PydanticCustomError("range", "The lower bound comes first, and is lower")
        if self.log and low <= 0:
            raise PydanticCustomError("range", "A logarithmic scale has no 0 nor less")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        bounds = self.uniform or self.log or self.integer
        assert bounds is not None
        return bounds


def _list_or_range(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return "list" if value else None
    return "range" if isinstance(value, dict | Range) else None


Domain = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[Any, ...], Tag("list")],
    Discriminator(
        _list_or_range, "domain", "Either a list of values, or {uniform: [low, high]}, {log: …} or {integer: …}"
    ),
]
"""The values of a key: a range, or those of a list, equally likely."""


def _dotted(value: Any) -> Any:
    return flatten(value) if isinstance(value, dict) else value


class SearchedStudent(Section):
    """A student that is searched: what it sets, and which keys it has beyond those of all."""

    set: Annotated[dict[str, Any], BeforeValidator(_dotted)] = Field({})
    space: dict[str, Domain] = Field({})


class SearchConfig(Section):
    """The file SPACE."""

    run_dir: str | None = Field(
        None, min_length=1, description="where everything is written; default: CONFIG's + -tune"
    )
    trials: Positive = Field(description="of each student")
    search: Literal["random", "tpe"] = Field("random", description="tpe: learns from the trials before; needs optuna")
    scheduler: Literal["none", "asha"] = Field("none", description="asha: stops trials that fall behind")
    grace_epochs: Positive = Field(20, description="of asha: epochs before a trial can be stopped")
    seeds: Seeds | None = Field(None, description="a list, or how many from 0 on, per trial; default: CONFIG's")
    timeout_s: Rate = Field(7200.0, description="longest wait for the next trial, and for a graph, in seconds")
    space: dict[str, Domain] = Field({}, description="keys that are searched for all students")
    students: dict[Name, SearchedStudent] = Field({}, description="default: the student of CONFIG")


@dataclass(frozen=True)
class Candidate:
    """A student that is searched."""

    name: str
    base: dict[str, Any]  # a whole configuration, as a tree, but for what is drawn
    written: dict[str, Any]  # the same with paths as they were given
    space: dict[str, Range | tuple[Any, ...]]  # by dotted key

    def config(self, settings: dict[str, Any]) -> Config:
        """The run's configuration with these values of the searched keys. Raises `InputError` if it is impossible."""
        try:
            config = Config.model_validate(merge(self.base, nested(settings)))
        except ValidationError as error:
            raise InputError("; ".join(text.partition(": ")[2] for text in refusals(error, "", []))) from None
        if len(config.student.models) > 1:
            raise InputError(f"student.models: a trial trains one student, found {', '.join(config.student.models)}")
        return config

    @property
    def shares_prepared(self) -> bool:
        """Whether all trials learn from the same graph, teacher and soft labels."""
        return not any(key.split(".")[0] in PREPARED for key in self.space)

    @property
    def repeats_prepared(self) -> bool:
        """Whether trials may learn from the same: two draws from a range never agree."""
        return not any(isinstance(domain, Range) for key, domain in self.space.items() if key.split(".")[0] in PREPARED)


@dataclass(frozen=True)
class Search:
    """A whole search, ready to be carried out."""

    settings: SearchConfig
    run_dir: str
    seeds: tuple[int, ...]
    config: Config
    candidates: list[Candidate]

    def identity(self, candidate: Candidate) -> dict[str, Any]:
        """All that decides a candidate's trials, by dotted key; not how many there are."""
        sections = flatten({name: candidate.written[name] for name in (*PREPARED, "student")})
        fixed = {key: value for key, value in sections.items() if key not in candidate.space}
        spaces = {f"space.{key}": _plain(domain) for key, domain in candidate.space.items()}
        names = ("search", "scheduler", *(("grace_epochs",) if self.settings.scheduler == "asha" else ()))
        search = {name: getattr(self.settings, name) for name in names}
        return json.loads(json.dumps({**fixed, **spaces, **search, "seeds": self.seeds}))


def load_search(config_path: str | Path, space_path: str | Path, overrides: list[str] | None = None) -> Search:
    """Read a run's configuration, with `key=value` overrides, and the file that says what is searched.

    Raises `InputError` naming the file, the key and the reason.
    """
    tree, overridden = read_tree(config_path, overrides)
    space_tree, _ = read_tree(space_path)
    try:
        written = Config.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(refusals(error, str(config_path), overridden))) from None
    try:
        settings = SearchConfig.model_validate(space_tree)
    except ValidationError as error:
        raise InputError("\n".join(_refusals(error, str(space_path)))) from None
    config = absolute(written)
    candidates = _candidates(settings, written, config)
    messages = [f"{space_path}: {text}" for each in candidates for text in _misfits(each, settings)]
    if messages:
        raise InputError("\n".join(dict.fromkeys(messages)))
    run_dir = absolute_path(settings.run_dir) if settings.run_dir else f"{config.run_dir.rstrip('/')}-tune"
    return Search(settings, run_dir, settings.seeds or (config.seed,), config, candidates)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


def _refusals(error: ValidationError, path: str) -> list[str]:
    """A message per wrong key of SPACE: the file, the key, the reason."""
    reasons = {"extra_forbidden": "unknown key", "missing": "missing; set it in the file"}
    return [
        f"{path}: {'.'.join(str(name) for name in item['loc'] if name not in ('range', 'list'))}: "
        + reasons.get(item["type"], f"{item['msg']}, found {item['input']!r}")
        for item in error.errors(include_url=False)
    ]


def _candidates(settings: SearchConfig, written: Config, config: Config) -> list[Candidate]:
    students = settings.students or {config.student.models[0]: SearchedStudent()}
    spaces = {
        name: {key: each for key, each in settings.space.items() if key not in student.set} | student.space
        for name, student in students.items()
    }
    needs = nested(_needs(config, [student.set for student in students.values()], list(spaces.values())))
    found, given = (merge(each.model_dump(mode="json"), needs) for each in (config, written))
    return [
        Candidate(name, merge(found, nested(student.set)), merge(given, nested(student.set)), spaces[name])
        for name, student in students.items()
    ]


def _needs(
    config: Config, sets: list[dict[str, Any]], spaces: list[dict[str, Range | tuple[Any, ...]]]
) -> dict[str, Any]:
    """What must be prepared for some student or other: prepared for all, it is prepared once."""
    default = flatten(config.model_dump(mode="json"))

    def values(key: str) -> list[Any]:
        found = [default[key], *(each[key] for each in sets if key in each)]
        domains = [each[key] for each in spaces if key in each]
        return found + [value for each in domains for value in (each.bounds if isinstance(each, Range) else each)]

    return {
        key: True
        for key, needed in {
            "soft_labels.entropy_change": "krd" in values("student.objective"),
            "soft_labels.hidden": any(
                isinstance(value, int | float) and value > 0 for value in values("student.similarity")
            ),
            "encodings.label_propagation": any(
                isinstance(value, list | tuple) and "prop" in value for value in values("student.inputs")
            ),
        }.items()
        if needed
    }


def _misfits(candidate: Candidate, settings: SearchConfig) -> list[str]:
    """What no other value of another key could mend."""
    own = settings.students.get(candidate.name, SearchedStudent())
    where = f" (in student {candidate.name})" if settings.students else ""
    keys = {**{key: f"students.{candidate.name}.set" for key in own.set}, **dict.fromkeys(candidate.space, "space")}
    messages = [
        f"{place}: {key}: a search sets keys of {', '.join(SECTIONS)}"
        for key, place in keys.items()
        if key.split(".")[0] not in SECTIONS or "." not in key
    ]
    messages += [
        f"students.{candidate.name}: {key}: is both set and searched" for key in own.set.keys() & own.space.keys()
    ]
    if not candidate.space:
        messages.append(f"space: no key is searched{where}")
    if messages:
        return messages
    first = {key: _some(domain)[0] for key, domain in candidate.space.items()}
    for key, domain in candidate.space.items():
        for value in _some(domain):
            try:
                config = Config.model_validate(merge(candidate.base, nested({**first, key: value})))
            except ValidationError as error:
                fatal = [item for item in error.errors(include_url=False) if item["type"] != "value_error"]
                texts = refusals(error, "", []) if fatal else []
                messages += [f"{text.partition(': ')[2]}{where}" for text in texts]
                continue
            if len(config.student.models) > 1:
                messages.append(
                    f"student.models: a trial trains one student, found {', '.join(config.student.models)}; "
                    f"name one, or list them under students, each with a set of its own{where}"
                )
    return messages


def _some(domain: Range | tuple[Any, ...]) -> list[Any]:
    """Values that show whether a key can have such: all of a list, of a range its bounds and one between them."""
    if isinstance(domain, Range):
        low, high = domain.bounds
        return [low, high] if domain.integer else [low, low + (high - low) / 3.7, high]
    return list(domain)


def _plain(domain: Range | tuple[Any, ...]) -> Any:
    return domain.model_dump(exclude_none=True) if isinstance(domain, Range) else domain
