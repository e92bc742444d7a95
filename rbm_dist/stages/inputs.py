"""Whether the files that the stage `source` read are still the same: their stamps are noted before they are read."""

from rich.console import Console

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.config.source import SourceSection
from rbm_dist.config.update import UpdateConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import inputs
from rbm_dist.stages import run as run_
from rbm_dist.stages.run import Stage

NOTE = "inputs.json"


def note_input(config: SourceSection | UpdateConfig, url: str) -> None:
    """Write the stamps of a source's files below `url`, unless they are there from an attempt that was cut off."""
    storage.once(storage.join(url, NOTE), lambda: inputs.input_files(config))


def check_input(stage: Stage, config: Config, url: str, overwrite: bool, console: Console) -> None:
    """Raise `InputError` if the source has other files than the stage read; with `overwrite` clear the stage instead.

    Elsewhere they may lie: the same names, sizes and times are the same input. What is not there any more, or was read
    by a version that noted nothing, is the same if it is called the same.
    """
    moved = run_.moved(stage, config, url)
    if moved is None:  # nothing was read
        return
    source = config.source if config.update is None else config.update
    note = storage.join(url, stage.folder, NOTE)
    noted = storage.exists(note)
    then = storage.read_json(note) if noted else {}
    there = inputs.are_there(source)
    if any(then.values()) and there:
        changed = inputs.change(then, inputs.input_files(source))
        what = "the input was changed after it was read"
    else:
        # Versions that noted nothing compared paths as they were given: what was absolute must be the same.
        same = all(_name(old) == _name(new) and (noted or not _is_absolute(old)) for old, new in moved.values())
        made = noted and not any(then.values())  # a class of PyG: where it keeps its files decides nothing
        changed = None if made or same else ""
        what = "this run directory was made from another input"
    if changed is None:
        if any(then.values()) and not there and storage.exists(storage.join(url, stage.folder, "manifest.json")):
            console.print(f"  {stage.name}: the input is no longer there; what was read of it is used", style="yellow")
    elif overwrite:
        run_.clear(stage, url)
    else:
        lines = [f"{url}: {what}{':' * bool(changed)} {changed}".rstrip()]
        lines += [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in moved.items()]
        raise InputError(
            "\n".join([*lines, "Give --overwrite to read it again and compute what follows, or set another run_dir"])
        )


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or "://" in path


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
