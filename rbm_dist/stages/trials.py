"""The folder of a search: what was searched, a file per trial that ended, the results.

`tune.json` is written first and tells the folder from a user's, `trials/<student>/trial-N.json` when a trial has ended,
`trials.csv`, `trials.parquet` and the best configurations at the end of every command.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml

from rbm_dist import __version__, storage
from rbm_dist.config.load import flatten
from rbm_dist.config.run import Config
from rbm_dist.config.tune import Search, nested
from rbm_dist.errors import InputError
from rbm_dist.report.experiment import Row, table_files
from rbm_dist.report.tune import COLUMNS, best, tidy


def refuse_other_files(url: str) -> None:
    """Raise `InputError` if a folder holds files, but is not a search's."""
    names = [name for name in storage.listdir(url) if name != ".lock" and not storage.is_temporary(name, "tune.json")]
    if names and not _identities(url):
        shown = f"{', '.join(names[:3])}{' …' * (len(names) > 3)}"
        raise InputError(f"{url}: holds {shown}, but no tune.json of a search. Set another run_dir in SPACE")


def begin(search: Search, overwrite: bool) -> None:
    """Note what is searched. Raises `InputError` if a student's trials were of another search, unless they may go."""
    url = search.run_dir
    before = _identities(url) or {}
    now = {each.name: search.identity(each) for each in search.candidates}
    messages = []
    for name in now:
        numbers = _numbers(url, name)
        if name not in before or not numbers:
            continue
        differing = [
            f"  {name}: {key}: {there} there, {here} now"
            for key in sorted(now[name].keys() | before[name].keys())
            if (there := _shown(before[name], key)) != (here := _shown(now[name], key))
        ]
        if differing and overwrite:
            for number in numbers:
                storage.remove(_row_url(url, name, number))
        elif differing:
            messages += differing
    if messages:
        raise InputError(
            f"{url}: these trials were made by another search:\n"
            + "\n".join(messages)
            + "\nSet another run_dir in SPACE, or give --overwrite to search anew"
        )
    storage.write_json(storage.join(url, "tune.json"), {"rbm_dist": __version__, "students": before | now})
    storage.remove_temporary(url, r"tune\.json|trials(\.(csv|parquet))?|best.*\.yaml")


def read_rows(url: str, student: str, trials: int) -> dict[int, Row]:
    """The rows of a student's trials that are done, by number."""

    def row(number: int) -> Row:
        row_url = _row_url(url, student, number)
        found = storage.read_json(row_url)
        if not isinstance(found, dict) or not found.keys() >= {*COLUMNS.names, "settings", "curve"}:
            raise InputError(f"{row_url}: is not a trial's, and would be written over. Move it, or set another run_dir")
        return found

    numbers = [number for number in _numbers(url, student) if number < trials]
    with ThreadPoolExecutor(max_workers=16) as pool:  # for object storage
        return dict(zip(numbers, pool.map(row, numbers), strict=True))


def write_results(search: Search, rows: list[Row]) -> None:
    """Write `trials.csv`, `trials.parquet`, `best-<student>.yaml` and `best.yaml` of the trials that are done."""
    url, files = search.run_dir, table_files("trials", tidy(rows))
    chosen = [best([row for row in rows if row["student"] == each.name]) for each in search.candidates]
    for row in filter(None, chosen):
        files[f"best-{row['student']}.yaml"] = _yaml(search, row)
    winner = best(rows)
    if winner:
        files["best.yaml"] = _yaml(search, winner)
    for name, content in files.items():
        with storage.atomic_writer(storage.join(url, name)) as stream:
            stream.write(content)


def differing_keys(search: Search, row: Row) -> dict[str, Any]:
    """What the configuration of a trial sets otherwise than CONFIG, as a tree of keys."""
    there, here = (flatten(each.model_dump(mode="json")) for each in (search.config, _config(search, row)))
    return nested({key: value for key, value in here.items() if key not in there or there[key] != value})


def _identities(url: str) -> dict[str, Any] | None:
    """What was searched in a folder, by student; None if no search was."""
    try:
        found = storage.read_json(storage.join(url, "tune.json"))
    except (InputError, OSError):
        return None
    return found["students"] if isinstance(found, dict) and found.keys() == {"rbm_dist", "students"} else None


def _shown(identity: dict[str, Any], key: str) -> str:
    return repr(identity[key]) if key in identity else "not set"


def write_row(url: str, row: Row) -> None:
    """Keep a trial that ended."""
    storage.write_json(_row_url(url, row["student"], row["trial"]), row)


def _row_url(url: str, student: str, number: int) -> str:
    return storage.join(url, "trials", student, f"trial-{number}.json")


def _numbers(url: str, student: str) -> list[int]:
    names = storage.listdir(storage.join(url, "trials", student))
    return [int(name[6:-5]) for name in names if name == f"trial-{name[6:-5]}.json" and name[6:-5].isdecimal()]


def _yaml(search: Search, row: Row) -> bytes:
    """The whole configuration of a trial, for `rbm-dist run`."""
    run_dir = storage.join(search.run_dir, "runs", row["student"])
    tree = _config(search, row).model_copy(update={"run_dir": run_dir}).model_dump(mode="json")
    found = f"{row['val']:.2%} on validation, the highest of {search.settings.trials} trials"
    note = f"# {row['student']}, trial {row['trial']}: {found}"
    return f"{note}\n{yaml.safe_dump(tree, sort_keys=False)}".encode()


def _config(search: Search, row: Row) -> Config:
    (candidate,) = (each for each in search.candidates if each.name == row["student"])
    return candidate.config(row["settings"])
