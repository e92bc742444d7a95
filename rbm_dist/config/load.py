"""How a YAML file and `key=value` overrides become a configuration.

`load(path, overrides)` is the only way in; local paths are absolute from there on, so that they mean the same in every
process and folder. Every refusal names the file, the key and the reason.
"""

from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.config.source import SourceConfig
from rbm_dist.config.update import UpdateConfig
from rbm_dist.errors import InputError

LOCATIONS = (
    "run_dir",
    *(f"source.{name}" for name in ("path", "nodes", "edges", "root", "arguments.root")),
    *(f"update.{name}" for name in ("run", "add_nodes", "add_edges", "drop_edges", "features")),
)
"""The keys that say where files are: paths, patterns or URLs."""


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key.subkey=value` overrides and validate; local paths start at the current folder.

    Raises `InputError` naming the file, the key and the reason.
    """
    tree, overridden = read_tree(path, overrides)
    try:
        return absolute(Config.model_validate(tree))
    except ValidationError as error:
        raise InputError("\n".join(refusals(error, str(path), overridden))) from None


def locations(config: Config) -> dict[str, str]:
    """The keys of `LOCATIONS` that are set, and what they are set to."""
    flat = flatten(config.model_dump())
    return {key: flat[key] for key in LOCATIONS if isinstance(flat.get(key), str)}


def absolute(config: Config) -> Config:
    """The configuration with its local paths made absolute, from the current folder or the user's (`~`)."""
    tree = config.model_dump()
    for key, path in locations(config).items():
        *sections, name = key.split(".")
        reduce(getitem, sections, tree)[name] = absolute_path(path)
    external = tree["teacher"]["external"]
    if external is not None:
        external["paths"] = [absolute_path(path) for path in external["paths"]]
        external["ids"] = external["ids"] and absolute_path(external["ids"])
    return Config.model_validate(tree)


def updated(run: str, out: str, update: UpdateConfig, overrides: list[str] | None = None) -> Config:
    """The configuration of a run that goes on from the run directory `run`; overrides: `cluster.key=value` alone.

    Raises `InputError` if there is none, or if it cannot be gone on from.
    """
    url = storage.join(storage.absolute(run), "config.json")
    if storage.absolute(out) == storage.absolute(run):
        raise InputError(f"{out}: is the run itself, which stays as it is; name another folder (--out)")
    if not storage.exists(url):
        raise InputError(f"{run}: not a run directory (no config.json)")
    tree = storage.read_json(url)
    for item in overrides or []:
        if not item.startswith("cluster."):
            raise InputError(f"command line: {item}: an update has the configuration of its run, but for cluster.…")
        _apply(tree, item)
    tree |= {"run_dir": out, "update": update.model_dump(exclude_none=True)}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(refusals(error, url, overrides or []))) from None
    if config.soft_labels.inference == "exact" and config.teacher.is_gnn:  # for the next update
        kept = config.soft_labels.model_copy(update={"keep_layers": True})
        config = config.model_copy(update={"soft_labels": kept})
    return absolute(config)


def absolute_path(path: str) -> str:
    """A local path made absolute; a URL as it is: what it takes to open it may be there in other processes only."""
    is_url = "://" in path and not path.startswith(("file://", "local://"))
    return path if is_url else storage.absolute(path)


def read_tree(path: str | Path, overrides: list[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """A YAML file's mapping with `key.subkey=value` overrides applied, and the keys that these set.

    Raises `InputError` naming the file and the reason.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot read the configuration: {reason}") from None
    try:
        tree, twice = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a date of month 13
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if twice:
        raise InputError("\n".join(f"{path}: {each}" for each in twice))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a configuration is a mapping of keys to values, found {type(tree).__name__}")
    return tree, [_apply(tree, item) for item in overrides or []]


def _parse(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML text, and a message per key that a mapping has twice: the value would be that of the last."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        twice = _twice(node, "", set())  # before merge keys (<<), which may be overridden, are put in their place
        return loader.construct_document(node), twice
    finally:
        loader.dispose()


def _twice(node: yaml.Node, prefix: str, seen: set[int]) -> list[str]:
    if id(node) in seen:  # an alias
        return []
    seen.add(id(node))
    messages = []
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            messages += _twice(item, f"{prefix}{index}.", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and not key.tag.endswith(":merge"):
                where = f"lines {lines[name]} and {line}" if lines[name] < line else f"line {line}"
                messages.append(f"{prefix}{key.value}: given twice ({where})")
            lines.setdefault(name, line)
            messages += _twice(value, f"{prefix}{key.value}.", seen)
    return messages


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`: the keys as a person writes them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _apply(tree: dict[str, Any], item: str) -> str:
    key, equals, value = item.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"command line: '{item}' is not of the form key=value, such as student.num_experts=16")
    try:
        # A mark, such as a delimiter, is itself, whatever it means in YAML; but for ~, which is null.
        is_mark = len(value) == 1 and not value.isalnum() and value != "~"
        parsed, twice = (value, []) if is_mark else _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"command line: {key}: '{value}' is not a YAML value") from None
    if twice:
        raise InputError("\n".join(f"command line: {key}: {each}" for each in twice))
    for name in names[:-1]:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise InputError(f"command line: {key}: '{name}' is a value, not a section")
        tree = child
    tree[names[-1]] = parsed
    return ".".join(names)


def refusals(error: ValidationError, path: str, overridden: list[str]) -> list[str]:
    """A message per wrong key: the file, the key, the reason. `overridden`: keys set on the command line."""
    # pydantic puts the discriminator's value into the location; a user never wrote it.
    kinds = [str(kind.model_fields["kind"].default) for kind in get_args(SourceConfig)]
    messages = []
    items = error.errors(include_url=False)
    # Of `models: [gcn]` pydantic also says that no model is left.
    implied = {item["loc"][:end] for item in items for end in range(1, len(item["loc"]))}
    for item in items:
        if item["loc"] in implied:
            continue
        names = [str(name) for name in item["loc"]]
        if len(names) > 2 and names[0] == "source" and names[1] in kinds:
            del names[1]
        key = ".".join(names)
        given = any(key == name or key.startswith(f"{name}.") for name in overridden)
        origin = f"{path} (and the command line)" if given else path
        reasons = {
            "extra_forbidden": "unknown key",
            "missing": "missing; set it in the file or on the command line",
            "union_tag_not_found": f"kind is missing; it is one of {', '.join(kinds)}",
            "union_tag_invalid": f"kind is {item.get('ctx', {}).get('tag')!r}; it is one of {', '.join(kinds)}",
        }
        if item["type"] == "value_error":  # a rule over several keys, which it names itself
            messages.append(f"{origin}: {item['msg'].removeprefix('Value error, ')}")
        else:
            reason = reasons.get(item["type"], f"{item['msg']}, found {item['input']!r}")
            messages.append(f"{origin}: {key}: {reason}")
    return messages
