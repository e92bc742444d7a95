"""The models of a server: exported folders by name, loaded, warmed up, and exchanged when a folder is exported anew.

Folders are looked at by size and time of change (or ETag) of their files, so that object storage will do.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.serve import format as format_
from rbm_dist.serve.batching import Batcher, blank, rows_on_loop
from rbm_dist.serve.format import Column
from rbm_dist.serve.loaded import EngineName, LoadedStudent, load
from rbm_dist.serve.metrics import Metrics

Stamps = tuple[tuple[str, int, str], ...]
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<folder>.+)")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class ServedModel:
    """One version of a model at work."""

    name: str
    student: LoadedStudent
    batcher: Batcher
    stamps: Stamps  # of the files it was loaded from


class Repository:
    """Models by name. Those who were given one go on with it after it was exchanged."""

    def __init__(self, folders: list[str], engine: EngineName, metrics: Metrics, log: Callable[..., None]):
        """Load all of them. folders: as on the command line, FOLDER or NAME=FOLDER. Raises `InputError`."""
        self._engine: EngineName = engine
        self._metrics, self._log = metrics, log
        self._folders = named(folders)
        self._models: dict[str, ServedModel] = {}
        self._refused: dict[str, object] = {}  # what was found in a folder when it could not be used
        for name, url in self._folders.items():
            self._put(self._load(name, url, _stamps(url)))

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def find(self, name: str | None = None, version: str | None = None) -> ServedModel | None:
        """A model by its name, by default the first; None if it, or this version of it, is not here."""
        model = next(iter(self._models.values())) if name is None else self._models.get(name)
        return None if model is None or version not in (None, model.student.digest) else model

    async def watch(self, every_s: float) -> None:
        """Look at the folders again and again, and exchange what changed. Ends when it is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            for name in self._folders:
                await self._look(name)

    async def _look(self, name: str) -> None:
        url, current = self._folders[name], self._models[name]
        found: object = None
        try:
            found = stamps = await asyncio.to_thread(_stamps, url)
            if stamps == current.stamps or stamps == self._refused.get(name):
                return
            model = await asyncio.to_thread(self._load, name, url, stamps)
            if await asyncio.to_thread(_stamps, url) != stamps:
                return  # still being written
        except Exception as error:  # whatever is wrong with the new one, the old one goes on
            said = found or str(error)
            if said != self._refused.get(name):
                self._metrics.reloads.labels(name, "refused").inc()
                self._log(event="reload refused", model=name, version=current.student.digest, reason=str(error))
            self._refused[name] = said
            return
        self._refused.pop(name, None)
        self._put(model)
        self._metrics.reloads.labels(name, "loaded").inc()
        self._log(event="reloaded", model=name, version=model.student.digest, before=current.student.digest)

    def _put(self, model: ServedModel) -> None:
        self._models[model.name] = model
        self._metrics.waiting.labels(model.name).set_function(lambda: model.batcher.waiting)

    def _load(self, name: str, url: str, stamps: Stamps) -> ServedModel:
        student = load(url, engine=self._engine)
        _warm_up(student)
        observe = self._metrics.batch_rows.labels(name).observe
        return ServedModel(name, student, Batcher(student, observe, rows_on_loop(student)), stamps)


def named(folders: list[str]) -> dict[str, str]:
    """Folders by the names of their models: `NAME=FOLDER`, or the name that the exported student has."""
    found: dict[str, str] = {}
    for each in folders:
        given = _NAMED.fullmatch(each)
        url = storage.absolute(given["folder"] if given else each)
        if not storage.exists(storage.join(url, format_.JSON)):
            raise InputError(
                f"{url}: no exported student there ({format_.JSON}); make one: rbm-dist export RUN --out FOLDER"
            )
        name = given["name"] if given else format_.read(url).name
        if name in found:
            raise InputError(f"{url}: a second model named {name}; name them: NAME={url}")
        if not _NAME.fullmatch(name):
            raise InputError(f"{url}: '{name}' cannot stand in a URL; name it: NAME={url}")
        found[name] = url
    return found


def _stamps(url: str) -> Stamps:
    """What tells the files of a student from those that were there before. Raises `InputError` without `model.json`."""
    names = (format_.WEIGHTS, format_.ONNX, format_.JSON)
    there = [each for each in names if each == format_.JSON or storage.exists(storage.join(url, each))]
    return tuple(storage.stamp(storage.join(url, each)) for each in there)


def _warm_up(student: LoadedStudent) -> None:
    """Have everything compiled and imported that an answer needs. Raises `InputError` for a student that gives NaN."""
    for rows in (1, 256):  # few go one by one, many sorted by expert
        if not np.isfinite(student.probabilities(blank(student, rows))).all():
            raise InputError(f"model {student.name}: its probabilities of a row of zeros are not finite")
    inputs = blank(student, 1)
    student.explain(inputs.pop("feat", None), **inputs)
    if "feat" in student.inputs:
        student.reader.from_records([{column.name: _blank_value(column) for column in student.reader.features.columns}])


def _blank_value(column: Column) -> Any:
    values: dict[str, Any] = {"number": 0.0, "text": "0", "bool": False, "list": [0.0] * column.width}
    return values.get(column.how, "")
