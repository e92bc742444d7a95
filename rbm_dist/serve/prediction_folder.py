"""A folder of predictions: a file for each input, and `predictions.json`, by which the same command goes on.

It is written first, with what is planned, and last, with the rows of each file. In between each finished file is noted
in a work folder, so that those who write need not know of each other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rbm_dist import __version__, storage
from rbm_dist.errors import InputError

MANIFEST = "predictions.json"
_WORK = "_work"  # below the folder, while it is filled


def write_once(folder: str, name: str, work: Callable[[str], int]) -> int:
    """Write a file of a folder, unless that was done before; gives its rows. work: writes it to a URL."""
    url, record = storage.join(folder, name), storage.join(folder, _WORK, f"{name}.json")
    if not storage.exists(url):
        storage.remove(record)
    return storage.once(record, lambda: work(url))


class PredictionFolder:
    """A folder of predictions and its `predictions.json`."""

    def __init__(self, url: str, identity: dict[str, Any]):
        """identity: the model and the options, ready for JSON."""
        self._url, self._identity = url, identity
        self._path = storage.join(url, MANIFEST)

    def plan(self, inputs: Mapping[str, list[Any]], overwrite: bool) -> dict[str, dict[str, Any]]:
        """Note what is going to be written; gives per file its input and its rows, None where it is still to be made.

        inputs: what each file is made of, as a stamp whose first entry names it.
        Raises `InputError` if other files are in the way, or, unless they may be overwritten, those of another model,
        other options or an input that has changed.
        """
        known = self._known()
        if known is None:
            for name in inputs:
                if storage.exists(storage.join(self._url, name)):
                    raise InputError(
                        f"{storage.join(self._url, name)}: is there, and no {MANIFEST} says that it holds predictions; "
                        "name another folder (--out)"
                    )
            files: dict[str, dict[str, Any]] = {}
        else:
            storage.remove_temporary(self._url)  # what was killed may have left some
            files = known["files"]
            differing = [key for key in self._identity if known.get(key) != self._identity[key]]
            changed = [name for name, stamp in inputs.items() if name in files and files[name]["input"] != stamp]
            if (differing or changed) and not overwrite:
                what = self._difference(known, differing) if differing else f"{inputs[changed[0]][0]} was changed"
                raise InputError(
                    f"{self._url}: holds other predictions: {what}. Name another folder, or give --overwrite to make "
                    "them again"
                )
            for name in list(files) if differing else changed:
                storage.remove(storage.join(self._url, name))
                storage.remove(storage.join(self._url, _WORK, f"{name}.json"))
                del files[name]
        for name, stamp in inputs.items():
            if name not in files or not storage.exists(storage.join(self._url, name)):
                files[name] = {"input": stamp, "rows": None}
        self._write(files)
        return files

    def finish(self, files: dict[str, dict[str, Any]]) -> None:
        """All files are there."""
        self._write(files)
        work = storage.join(self._url, _WORK)
        if storage.exists(work):
            storage.remove_work(work)

    def _write(self, files: dict[str, dict[str, Any]]) -> None:
        made = self._identity | {"predictions": True, "rbm_dist": __version__, "files": files}
        storage.write_json(self._path, made)

    def _known(self) -> dict[str, Any] | None:
        if not storage.exists(self._path):
            return None
        found = storage.read_json(self._path)
        if not isinstance(found, dict) or not found.get("predictions") or not isinstance(found.get("files"), dict):
            raise InputError(f"{self._path}: is not that of predictions; name another folder (--out)")
        return found

    def _difference(self, known: dict[str, Any], keys: list[str]) -> str:
        then, now = known.get(keys[0]) or {}, self._identity[keys[0]]
        key = next((key for key in now if then.get(key) != now[key]), "")
        return f"{keys[0]}.{key}: {then.get(key)} there, {now.get(key)} now"
