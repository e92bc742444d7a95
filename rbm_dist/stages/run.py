"""A run: its directory, and the rule by which a stage is skipped, gone on with, or started.

A stage owns one folder of the run directory. `config.json` is written there first (the configuration it was started
with), `manifest.json` last (what it wrote, with checksums). So the same command again is the whole recovery story.
A folder of such a name without such a `config.json` is the user's: it is refused, not written to.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from rbm_dist import __version__, storage
from rbm_dist.config.load import LOCATIONS, flatten
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError

if TYPE_CHECKING:
    from rbm_dist.runtime.mailbox import Reporter
    from rbm_dist.runtime.training import TrainingGroups

Files = dict[str, storage.FileInfo]

# By these keys a run knows its own files: those of every version's config.json, of a run and of a stage.
_OF_A_RUN = {"run_dir", "seed", "source", "teacher", "student", "cluster"}
_CLEARED: dict[str, None] = {"config": None, "upstream": None}
_ANOTHER = "Set another run_dir"


@dataclass(frozen=True)
class Run:
    """What a stage gets: the configuration, where to write, whom to tell."""

    config: Config
    url: str
    reporter: "Reporter"
    token: int = 0  # of the driver at work, see `stages.lease`; 0: it needs none
    groups: "TrainingGroups | None" = None  # of workers that train; in one process there are none

    def path(self, *names: str) -> str:
        return storage.join(self.url, *names)

    @property
    def graph_url(self) -> str:
        return self.path("graph")

    def files_of(self, folder: str) -> Files:
        """What a finished stage wrote, with checksums; paths relative to the run."""
        return storage.read_json(self.path(folder, "manifest.json"))["files"]


@dataclass(frozen=True)
class Stage:
    """One stage. `sections` are the parts of the configuration that decide what it computes, or keys of one of them."""

    name: str
    folder: str
    sections: tuple[str, ...]
    work: Callable[[Run], Files]  # gives the files it wrote, by path below the run
    reset: Callable[[str], None] | None = None  # removes what it wrote outside its folder, given the run's URL
    makes: str = ""  # a regular expression of the files and folders that it makes in its folder
    reader: "Stage | None" = None  # the only one that reads its files; once that is done, they may be deleted

    def identity(self, config: Config) -> dict[str, Any]:
        tree = config.model_dump(mode="json")
        return {"seed": tree["seed"]} | {part: reduce(getitem, part.split("."), tree) for part in self.sections}


def started(stage: Stage, url: str) -> dict[str, Any] | None:
    """What a stage was started with, `config` and `upstream`; None if it was not, or was cleared."""
    note = _read(url, stage, "config.json")
    return None if note == _CLEARED else note


def manifest(stage: Stage, url: str) -> dict[str, Any] | None:
    """What a stage wrote when it was finished; None if it is not."""
    return _read(url, stage, "manifest.json")


def state(stage: Stage, url: str, upstream: str | None, progress: Callable[[int], None] | None = None) -> str:
    """`done`, `started` or `new`. Raises `InputError` if a finished stage's files are damaged.

    A file is read if its time of change is not the one noted, as after a move that set new ones; with `progress`, which
    is told of the bytes that are read, every file is.
    """
    note, finished = started(stage, url), manifest(stage, url)
    if note is None or note["upstream"] != upstream:
        return "new"
    if finished is None:
        return "started"
    files = finished["files"]
    there = {name: files[name] for name in storage.sizes_and_times(url, files)}
    if len(there) < len(files) and not _is_read(stage, url):
        return "new"
    noted = finished.get("times", {}) if progress is None else {}
    times = storage.verify(url, there, noted, progress or (lambda size: None))
    if times.items() - finished.get("times", {}).items():
        storage.write_json(storage.join(url, stage.folder, "manifest.json"), {**finished, "times": times})
    return "done"


def _is_read(stage: Stage, url: str) -> bool:
    """Whether all has been made of a stage's files that ever is."""
    if stage.reader is None or manifest(stage.reader, url) is None:
        return False
    note = started(stage.reader, url)
    return note is not None and note["upstream"] == digest(stage, url)


def refuse_other_files(stages: list[Stage], url: str) -> None:
    """Raise `InputError` if what a run would write over or delete is not a run's. Writes nothing."""
    path = storage.join(url, "config.json")
    if storage.exists(path):
        if not _has_keys(path, _OF_A_RUN.issubset):
            raise InputError(f"{path}: is not a run's, and a run would write its own there. {_ANOTHER}")
    else:
        for name in ("results.json", "metrics.jsonl", "status.json", "tensorboard"):
            if storage.exists(storage.join(url, name)):
                raise InputError(f"{storage.join(url, name)}: is not a run's (there is no {path}). {_ANOTHER}")
    for stage in stages:
        folder = storage.join(url, stage.folder)
        # A kill in its first write leaves that alone.
        names = [name for name in storage.listdir(folder) if not storage.is_temporary(name, "config.json")]
        if names and not _has_keys(storage.join(folder, "config.json"), _CLEARED.keys().__eq__):
            shown = f"{', '.join(names[:3])}{' …' * (len(names) > 3)}"
            raise InputError(
                f"{folder}: holds {shown}, but no config.json of the stage {stage.name}, which would write and delete "
                f"there. {_ANOTHER}, or move that folder"
            )


def remove_temporary(stages: list[Stage], url: str) -> None:
    """Delete what killed writers left of a run's own files."""
    storage.remove_temporary(url, r"(config|results|owner|status)\.json|metrics\.jsonl")
    for stage in stages:
        storage.remove_temporary(storage.join(url, stage.folder), rf"(config|manifest)\.json|{stage.makes}")


def refuse_other_configuration(stages: list[Stage], config: Config, url: str) -> None:
    """Raise `InputError`, naming the keys, if the run directory was made by another configuration."""
    differing = {}
    for stage in stages:
        note = started(stage, url)
        if note is None:
            continue
        then, now = flatten(note["config"]), flatten(stage.identity(config))
        for key in _differing(then, now):
            differing[key] = f"  {key}: {_show(then, key)} there, {_show(now, key)} now"
    if differing:
        raise InputError(
            f"{url}: this run directory was made by another configuration:\n"
            + "\n".join(differing.values())
            + "\nSet another run_dir, or give --overwrite to compute the stages concerned again"
        )


def discard_other_configuration(stages: list[Stage], config: Config, url: str) -> None:
    """Delete what was computed with another configuration, and all that came after it."""
    stale = False
    for stage in stages:
        note = started(stage, url)
        stale = stale or (
            note is not None and bool(_differing(flatten(note["config"]), flatten(stage.identity(config))))
        )
        if stale:
            clear(stage, url)


def moved(stage: Stage, config: Config, url: str) -> dict[str, tuple[str, str]] | None:
    """The keys of `LOCATIONS` in which a stage was started with other values, and both; None if it was not started."""
    note = started(stage, url)
    if note is None:
        return None
    then, now = flatten(note["config"]), flatten(stage.identity(config))
    return {key: (str(then.get(key)), str(now.get(key))) for key in LOCATIONS if then.get(key) != now.get(key)}


def clear(stage: Stage, url: str) -> None:
    """Delete what a stage wrote; what else lies in its folder stays."""
    folder = storage.join(url, stage.folder)
    note = storage.join(folder, "config.json")
    if storage.exists(note):
        # First: what a kill leaves of the rest is then not gone on with, and still known as a run's.
        storage.write_json(note, _CLEARED)
    if stage.reset:
        stage.reset(url)
    for name in storage.listdir(folder):
        if re.fullmatch(rf"manifest\.json|{stage.makes}", name):
            storage.remove(storage.join(folder, name))
    if storage.listdir(folder) == ["config.json"]:
        storage.remove(note)
        storage.remove_empty(folder)


def begin(stage: Stage, config: Config, url: str, upstream: str | None) -> None:
    """Clear the stage's folder and note what it is started with."""
    clear(stage, url)
    storage.write_json(
        storage.join(url, stage.folder, "config.json"), {"config": stage.identity(config), "upstream": upstream}
    )


def finish(stage: Stage, url: str, files: Files, seconds: float) -> None:
    storage.write_json(
        storage.join(url, stage.folder, "manifest.json"),
        {
            "stage": stage.name,
            "rbm_dist": __version__,
            "seconds": round(seconds, 3),
            "finished": time.time(),
            "files": files,
            "times": {name: time for name, (_, time) in storage.sizes_and_times(url, files).items()},
        },
    )


def digest(stage: Stage, url: str) -> str:
    """A checksum of a finished stage's result, that stages downstream remember."""
    files = storage.read_json(storage.join(url, stage.folder, "manifest.json"))["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def seconds(stages: list[Stage], url: str) -> dict[str, float]:
    """How long each finished stage took."""
    finished = {stage.name: manifest(stage, url) for stage in stages}
    return {name: each["seconds"] for name, each in finished.items() if each is not None}


def _has_keys(url: str, are_right: Callable[[Any], bool]) -> bool:
    """Whether a file is a JSON mapping of such keys."""
    try:
        found = storage.read_json(url)
    except (InputError, IsADirectoryError, NotADirectoryError):
        return False
    return isinstance(found, dict) and are_right(found.keys())


def _read(url: str, stage: Stage, name: str) -> dict[str, Any] | None:
    path = storage.join(url, stage.folder, name)
    return storage.read_json(path) if storage.exists(path) else None


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys that decide what is computed; of where files are, `stages.inputs` decides by the files."""
    keys = (then.keys() | now.keys()) - set(LOCATIONS)
    return sorted(key for key in keys if then.get(key) != now.get(key))


def _show(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"
