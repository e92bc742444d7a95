"""`rbm-dist predict`: tables of new nodes, or the nodes of a run's graph, to one file or to a folder of files.

In a folder each input file, or part of the graph, has a file of its own that is there whole or not at all.
`predictions.json` says what they were made of and by what; so the same command again goes on. Ray is imported only for
a cluster, and torch only for the nodes of a graph.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa
from rich.console import Console
from threadpoolctl import threadpool_limits

from rbm_dist import __version__, storage
from rbm_dist.errors import InputError
from rbm_dist.report.progress import ProgressBars
from rbm_dist.serve.loaded import LoadedStudent, load
from rbm_dist.serve.prediction_files import Format, Layout, Predictions, format_of, refuse_other_file, write
from rbm_dist.serve.tables import NodeTable, ReadOptions, open_tables, predictions
from rbm_dist.serve.unseen import EdgeOptions, Encoder, NewEdges, encodings_of, new_edges, open_known
from rbm_dist.sources import table_files
from rbm_dist.sources.pieces import file_name, folder_of

MANIFEST = "predictions.json"
_WORK = "_work"  # below a folder of predictions, while it is filled
_TIMEOUT_S = 3600.0  # for the next file of a cluster
_LOOP = "predict"
OnRows = Callable[[int], None]


class Job(Protocol):
    """One file or part, as a task is given it."""

    @property
    def stamp(self) -> list[Any]:
        """What tells it from one that was there before."""
        ...

    @property
    def rows(self) -> int:
        """About, where it is not known before it is read."""
        ...

    def chunks(self, first_row: int = 0) -> Iterator[Predictions]:
        """Its predictions, in order. first_row: the number of its first row, where ids are row numbers."""
        ...

    def id_type(self) -> pa.DataType:
        """The type of ids in its predictions."""
        ...


@dataclass(frozen=True)
class TableJob:
    """A file of new nodes."""

    model: str
    kind: str
    digest: str
    table: NodeTable
    run: str | None = None  # whose graph edges lead to
    edges: NewEdges | None = None

    @property
    def stamp(self) -> list[Any]:
        return list(self.table.stamp)

    @property
    def rows(self) -> int:
        return self.table.rows

    def id_type(self) -> pa.DataType:
        return self.table.written_id

    def chunks(self, first_row: int = 0) -> Iterator[Predictions]:
        student = _student(self.model, self.kind, self.digest)
        encode = None
        if self.run is not None and self.edges is not None:
            encode = Encoder(
                _known(self.run, self.model, self.kind, self.digest), self.edges, encodings_of(student.model)
            )
        return predictions(student, self.table, encode, first_row)


@dataclass(frozen=True)
class PartJob:
    """A part of a run's graph."""

    run: str
    kind: str
    part: int
    rows: int
    stamp: list[Any]

    def id_type(self) -> pa.DataType:
        from rbm_dist.serve.predictor import id_type

        return id_type(_graph(self.run, self.kind)[2])

    def chunks(self, first_row: int = 0) -> Iterator[Predictions]:
        from rbm_dist.serve.predictor import predict

        return predict(*_graph(self.run, self.kind), [self.part])


@dataclass(frozen=True)
class Output:
    """Where predictions go, and as what."""

    url: str
    format: Format
    is_file: bool
    layout: Layout

    @classmethod
    def of(cls, out: str, wanted: Format | None, layout: Layout) -> "Output":
        """`out`: a file, if it ends as one, else a folder. Raises `InputError` for a file of another format."""
        url, found = storage.absolute(out), format_of(out)
        if wanted and found and wanted != found:
            raise InputError(f"{out}: ends as {found}, but --format says {wanted}; change one of the two")
        if found is None and "." in file_name(out) and not out.endswith("/"):
            raise InputError(
                f"{out}: predictions are written as Parquet or CSV; name a file that ends in .parquet, .pq or .csv, or "
                "a folder, with a / behind it (--out)"
            )
        return cls(url.rstrip("/"), found or wanted or "parquet", found is not None, layout)


def predict_tables(
    model: str, kind: str, nodes: str, out: str, reading: ReadOptions, edges: EdgeOptions | None, console: Console, *,
    top_k: int | None = None, format_: Format | None = None, address: str | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Predictions for the rows of tables; gives how many. Raises `InputError` or `RunError`."""
    model, nodes = storage.absolute(model), storage.absolute(nodes)
    student = load(model, kind)
    output = Output.of(out, format_, Layout(student.model.num_classes, student.class_names, top_k))
    _refuse_place(output, address)
    needed = encodings_of(student.model)
    if needed and edges is None:
        raise InputError(
            f"student {student.name}: learned from '{needed[0]}' besides features, which says where a node lies in the "
            "graph; give the edges of the new nodes (--edges)"
        )
    if edges and not needed:
        raise InputError(f"student {student.name}: has no use for edges; it learned from features alone (--edges)")
    tables = open_tables(nodes, student.model, student.reader.column_types, reading)
    passed_over = max(table.others for table in tables)
    if passed_over:
        console.print(f"  {passed_over:,} columns are not the student's and are passed over", highlight=False)
    jobs = [TableJob(model, kind, student.digest, table) for table in tables]
    identity = {
        "model": {"name": student.name, "digest": student.digest},
        "options": _options(output) | asdict(reading) | {"edges": None},
    }
    if edges:
        stamps = [list(stamp) for stamp in table_files.find(edges.edges, "--edges")]
        graph = storage.file_info(storage.join(edges.run, "graph", "graph.json"))["sha256"] if needed else ""
        store = _known(edges.run, model, kind, student.digest)
        found = new_edges(tables, store, edges, reading)
        jobs = [
            TableJob(model, kind, student.digest, table, edges.run, own)
            for table, own in zip(tables, found, strict=True)
        ]
        identity["options"]["edges"] = asdict(edges) | {"files": stamps, "graph": graph}
    names = {_output_name(job.table.file.url, nodes, output.format): job for job in jobs}
    return _predict(output, names, identity, console, address, overwrite)


def predict_graph(
    run: str, kind: str, out: str, console: Console, *, top_k: int | None = None, format_: Format | None = None,
    address: str | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Predictions for all nodes of a finished run's graph; gives how many. Raises `InputError` or `RunError`."""
    from rbm_dist.graph.shards import part_name
    from rbm_dist.serve.predictor import ID_ARRAYS
    from rbm_dist.stages.finished import verify_student

    run = storage.absolute(run)
    output = Output.of(out, format_, Layout(1, None, top_k))
    _refuse_place(output, address)
    verify_student(run, kind, ID_ARRAYS)
    student = load(run, kind)
    layout = Layout(student.model.num_classes, student.class_names, top_k)
    output = Output(output.url, output.format, output.is_file, layout)
    _, _, store = _graph(run, kind)
    graph = storage.file_info(storage.join(run, "graph", "graph.json"))["sha256"]
    names = {
        f"{part_name(part)}.{output.format}": PartJob(run, kind, part, len(store.ids(part)), [part_name(part), graph])
        for part in range(store.num_parts)
    }
    identity = {"model": {"name": student.name, "digest": student.digest}, "options": _options(output)}
    return _predict(output, names, identity, console, address, overwrite)


def _refuse_place(output: Output, address: str | None) -> None:
    if output.is_file:
        refuse_other_file(output.url)
        if address:
            raise InputError(f"{output.url}: a cluster writes a file for each input; name a folder (--out)")


def _options(output: Output) -> dict[str, Any]:
    return {"format": output.format, "top_k": output.layout.top_k}


def _output_name(file: str, nodes: str, format_: Format) -> str:
    """The path of an input below the folder that was asked for, with the output's ending behind it unless it has it."""
    fs, path = storage.filesystem(nodes)
    asked = path if storage.is_local(nodes) else fs.unstrip_protocol(path)
    if not file.startswith(f"{asked}/"):  # a file itself, or a pattern
        asked = folder_of(re.split(r"[*?[]", asked, maxsplit=1)[0])
    name = file.removeprefix(f"{asked}/")
    return name if name.endswith(f".{format_}") else f"{name}.{format_}"


def _predict(
    output: Output, jobs: Mapping[str, Job], identity: dict[str, Any], console: Console, address: str | None,
    overwrite: bool,
) -> int:  # fmt: skip
    if output.is_file:
        with _here(console) as bars:
            return _joined(output, list(jobs.values()), _Progress(bars, sum(job.rows for job in jobs.values())))
    planned = _Folder(output, identity).plan(jobs, overwrite)
    todo = [(output, name, jobs[name]) for name, entry in planned.items() if name in jobs and entry["rows"] is None]
    if len(todo) < len(jobs):
        console.print(f"  {len(jobs) - len(todo):,} of {len(jobs):,} files: done before", highlight=False)
    total = sum(job.rows for _, _, job in todo)
    if todo and address:
        rows = _on_cluster(todo, total, console, address)
    else:
        with _here(console) as bars:
            progress = _Progress(bars, total)
            rows = [_once(*each, progress) for each in todo]
    for (_, name, _), found in zip(todo, rows, strict=True):
        planned[name]["rows"] = found
    _Folder(output, identity).finish(planned)
    return sum(planned[name]["rows"] for name in jobs)


@contextmanager
def _here(console: Console) -> Iterator[ProgressBars]:
    """Work in this process: one thread computes, for another reads."""
    with threadpool_limits(1), ProgressBars(console) as bars:
        yield bars


def _joined(output: Output, jobs: Sequence[Job], on_rows: OnRows) -> int:
    """One file of all."""
    kinds = [job.id_type() for job in jobs]
    kind = kinds[0]
    for other in kinds[1:]:
        both = kind if other == kind else table_files.unified(kind, other)
        if both is None or (isinstance(kind, pa.BaseExtensionType) and other != kind):
            raise InputError(f"{output.url}: ids of {kind} and of {other} cannot be joined; name a folder (--out)")
        kind = both

    def chunks() -> Iterator[Predictions]:
        row = 0
        for job in jobs:
            for found in job.chunks(row):
                row += len(found.node_id)
                ids = found.node_id if found.node_id.type == kind else table_files.cast(found.node_id, kind)
                yield Predictions(ids, found.probability_nC)

    return write(output.url, output.format, _told(chunks(), on_rows), output.layout, kind)


def _told(chunks: Iterator[Predictions], on_rows: OnRows) -> Iterator[Predictions]:
    for found in chunks:
        yield found
        on_rows(len(found.node_id))


class _Progress:
    """Rows that are done, on a bar; of text their number is an estimate."""

    def __init__(self, bars: ProgressBars, total: int):
        self._bars, self._total, self._done = bars, total, 0

    def __call__(self, rows: int) -> None:
        self._done += rows
        self._bars.update(_LOOP, self._done, max(self._total, self._done), "rows")


def _once(output: Output, name: str, job: Job, on_rows: OnRows) -> int:
    """Write one file of a folder, unless that was done before; gives its rows."""
    url, record = storage.join(output.url, name), storage.join(output.url, _WORK, f"{name}.json")
    if not storage.exists(url):
        storage.remove(record)

    def work() -> int:
        return write(url, output.format, _told(job.chunks(), on_rows), output.layout, job.id_type())

    return storage.once(record, work)


def _on_cluster(todo: list[tuple[Output, str, Job]], total: int, console: Console, address: str) -> list[int]:
    from rbm_dist.config.run import ClusterConfig
    from rbm_dist.runtime.cluster import ray_cluster
    from rbm_dist.runtime.progress import ProgressRelay, start_mailbox
    from rbm_dist.runtime.tasks import run_tasks

    with (
        ray_cluster(ClusterConfig(), address),
        ProgressBars(console) as bars,
        ProgressRelay(start_mailbox(), bars) as relay,
    ):
        arguments = ((*each, relay.reporter, total) for each in todo)
        return run_tasks(_LOOP, _task, arguments, _TIMEOUT_S)


def _task(output: Output, name: str, job: Job, reporter: Any, total: int) -> int:
    with threadpool_limits(1):
        return _once(output, name, job, lambda rows: reporter.add(_LOOP, rows, total, "rows"))


class _Folder:
    """A folder of predictions and its `predictions.json`."""

    def __init__(self, output: Output, identity: dict[str, Any]):
        self._url, self._identity = output.url, identity
        self._path = storage.join(output.url, MANIFEST)

    def plan(self, jobs: Mapping[str, Job], overwrite: bool) -> dict[str, dict[str, Any]]:
        """Note what is going to be written; gives per file its input and its rows, None where it is still to be made.

        Raises `InputError` if other files are in the way, or, unless they may be overwritten, those of another model,
        other options or an input that has changed.
        """
        storage.remove_temporary(self._url)
        known = self._known()
        if known is None:
            for name in jobs:
                if storage.exists(storage.join(self._url, name)):
                    raise InputError(
                        f"{storage.join(self._url, name)}: is there, and no {MANIFEST} says that it holds predictions; "
                        "name another folder (--out)"
                    )
            files: dict[str, dict[str, Any]] = {}
        else:
            files = known["files"]
            differing = [key for key in self._identity if known.get(key) != self._identity[key]]
            changed = [name for name, job in jobs.items() if name in files and files[name]["input"] != job.stamp]
            if (differing or changed) and not overwrite:
                what = self._difference(known, differing) if differing else f"{jobs[changed[0]].stamp[0]} was changed"
                raise InputError(
                    f"{self._url}: holds other predictions: {what}. Name another folder, or give --overwrite to make "
                    "them again"
                )
            for name in list(files) if differing else changed:
                storage.remove(storage.join(self._url, name))
                storage.remove(storage.join(self._url, _WORK, f"{name}.json"))
                del files[name]
        for name, job in jobs.items():
            if name not in files or not storage.exists(storage.join(self._url, name)):
                files[name] = {"input": job.stamp, "rows": None}
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


@lru_cache(1)
def _student(model: str, kind: str, digest: str) -> LoadedStudent:
    found = load(model, kind)
    if found.digest != digest:
        raise InputError(f"{model}: the student was changed while it was at work; start again")
    return found


@lru_cache(1)
def _known(run: str, model: str, kind: str, digest: str) -> Any:
    return open_known(run, _student(model, kind, digest).model)


@lru_cache(1)
def _graph(run: str, kind: str) -> tuple[Any, tuple[str, ...], Any]:
    """The network of a run's student, its inputs, and the graph."""
    from rbm_dist.graph.store import GraphStore
    from rbm_dist.serve.from_run import read_run
    from rbm_dist.serve.network import network_of

    model, tensors = read_run(run, kind)
    network = network_of(model.network.model_dump(), tensors, few=1)
    return network, model.network.inputs, GraphStore.open(storage.join(run, "graph"))
