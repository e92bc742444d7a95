"""A teacher from elsewhere in a run: looked at by the stage `teacher`, asked by the stage `soft_labels`."""

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.config.teacher import ExternalTeacherConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.store import GraphStore
from rbm_dist.train.external_teacher import ExternalTeacher

EXTERNAL = "external.json"
"""What it is, in the folder of the stage `teacher`."""


def require_files(config: Config) -> None:
    """Raise `InputError` if a file of a teacher from elsewhere is not there: before other stages, not hours after."""
    if config.teacher.external is not None:
        _stamps(config.teacher.external)


def look_at_external(config: Config, graph_url: str, url: str) -> storage.FileInfo:
    """Check the predictions of a teacher from elsewhere; writes what they are below `url`. Raises `InputError`."""
    settings = config.teacher.external
    assert settings is not None
    teacher = ExternalTeacher(settings, GraphStore.open(graph_url))
    found = teacher.check()
    if config.teacher.fits_temperatures:
        found["temperature"] = teacher.fit_temperatures()
    return storage.write_json(f"{url}/{EXTERNAL}", found | {"files": _stamps(settings)})


def open_external(config: Config, store: GraphStore, url: str) -> ExternalTeacher:
    """The teacher from elsewhere that was looked at. Raises `InputError` if a file was changed since."""
    settings = config.teacher.external
    assert settings is not None
    found, now = storage.read_json(f"{url}/{EXTERNAL}"), _stamps(settings)
    changed = [after[0] for before, after in zip(found["files"], now, strict=True) if list(before) != list(after)]
    if changed:
        raise InputError(
            f"{changed[0]}: was changed after the stage teacher looked at it; delete {url} to have it looked at again, "
            "or set another run_dir"
        )
    return ExternalTeacher(settings, store, found.get("temperature"))


def _stamps(settings: ExternalTeacherConfig) -> list[tuple[str, int, str]]:
    paths = [*settings.paths, *([settings.ids] if settings.ids else [])]
    for path in paths:
        if not storage.exists(path):
            raise InputError(f"{path}: no such file (teacher.external)")
    return [storage.stamp(path) for path in paths]
