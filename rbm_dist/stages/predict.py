"""`rbm-dist predict`: tables of new nodes, or the nodes of a run's graph, to one file or to a folder of files.

In a folder each input file, or part of the graph, has a file of its own that is there whole or not at all.
`predictions.json` says what they were made of and by what; so the same command again goes on. Ray is imported only for
a cluster, and torch only for the nodes of a graph.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from rich.console import Console
from threadpoolctl import threadpool_limits

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.report.progress import ProgressBars
from rbm_dist.serve.loaded import LoadedStudent, load
from rbm_dist.serve.prediction_files import Format, Layout, Predictions, format_of, refuse_other_file, write
from rbm_dist.serve.prediction_folder import PredictionFolder, write_once
from rbm_dist.serve.tables import ReadOptions, open_tables
from rbm_dist.serve.unseen import EdgeOptions, encodings_of, new_edges
from rbm_dist.sources import table_files
from rbm_dist.sources.pieces import file_name, folder_of
from rbm_dist.stages.prediction_jobs import Chunks, Job, PartJob, TableJob, known_graph

_LOOP = "predict"
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Output:
    """Where predictions go, and as what."""

    url: str
    format: Format
    is_file: bool
    top_k: int | None

    @classmethod
    def of(cls, out: str, wanted: Format | None, top_k: int | None, address: str | None) -> "Output":
        """`out`: a file, if it ends as one, else a folder. Raises `InputError` for what cannot be written there."""
        url, found = storage.absolute(out), format_of(out)
        if wanted and found and wanted != found:
            raise InputError(f"{out}: ends as {found}, but --format says {wanted}; change one of the two")
        if found is None and "." in file_name(out) and not out.endswith("/"):
            raise InputError(
                f"{out}: predictions are written as Parquet or CSV; name a file that ends in .parquet, .pq or .csv, or "
                "a folder, with a / behind it (--out)"
            )
        if found is not None:
            refuse_other_file(url)
            if address:
                raise InputError(f"{out}: a cluster writes a file for each input; name a folder (--out)")
        return cls(url.rstrip("/"), found or wanted or "parquet", found is not None, top_k)

    def write(self, url: str, chunks: Chunks, student: LoadedStudent, id_type: pa.DataType) -> int:
        """Write one file; gives its rows."""
        layout = Layout(student.model.num_classes, student.class_names, self.top_k)
        with closing(chunks):  # at once: a thread that still reads while the interpreter ends may hold it for ever
            return write(url, self.format, chunks, layout, id_type)


def predict_tables(
    model: str, kind: str, nodes: str, out: str, reading: ReadOptions, edges: EdgeOptions | None, console: Console, *,
    top_k: int | None = None, format_: Format | None = None, address: str | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Predictions for the rows of tables; gives how many. Raises `InputError` or `RunError`."""
    model, nodes = storage.absolute(model), storage.absolute(nodes)
    student = load(model, kind)
    output = Output.of(out, format_, top_k, address)
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
        edges = replace(edges, edges=storage.absolute(edges.edges), run=storage.absolute(edges.run))
        store = known_graph(edges.run, model, kind, student.digest)
        identity["options"]["edges"] = {
            "files": [list(stamp) for stamp in table_files.find(edges.edges, "--edges")],
            "columns": [edges.src, edges.dst], "unknown_nodes": edges.unknown_nodes,
            "graph": [_checksum(store.url, f"{name}.json") for name in ("graph", *needed)],
        }  # fmt: skip
        found = new_edges(tables, store, edges, reading)
        jobs = [
            TableJob(model, kind, student.digest, table, edges.run, own)
            for table, own in zip(tables, found, strict=True)
        ]
    names = {_output_name(job.table.file.url, nodes, output.format): job for job in jobs}
    return _predict(output, names, identity, console, address, overwrite)


def predict_graph(
    run: str, kind: str, out: str, console: Console, *, top_k: int | None = None, format_: Format | None = None,
    address: str | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Predictions for all nodes of a finished run's graph; gives how many. Raises `InputError` or `RunError`."""
    from rbm_dist.graph.shards import part_name
    from rbm_dist.serve.predictor import ID_ARRAYS
    from rbm_dist.stages.finished import graph_of

    run = storage.absolute(run)
    output = Output.of(out, format_, top_k, address)
    store = graph_of(run, kind, ID_ARRAYS)
    student = load(run, kind)
    read = (*ID_ARRAYS[: 1 + store.named], *student.inputs)
    names = {
        f"{part_name(part)}.{output.format}": PartJob(
            run, kind, student.digest, part, len(store.ids(part)), [part_name(part), store.digest(part, read)]
        )
        for part in range(store.num_parts)
    }
    identity = {"model": {"name": student.name, "digest": student.digest}, "options": _options(output)}
    return _predict(output, names, identity, console, address, overwrite)


def _checksum(folder: str, name: str) -> str:
    return str(storage.file_info(storage.join(folder, name))["sha256"])


def _options(output: Output) -> dict[str, Any]:
    return {"format": output.format, "top_k": output.top_k}


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
    folder = PredictionFolder(output.url, identity)
    planned = folder.plan({name: job.stamp for name, job in jobs.items()}, overwrite)
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
    folder.finish(planned)
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

    def chunks() -> Chunks:
        row = 0
        for job in jobs:
            with closing(job.chunks(row)) as of_one:
                for found in of_one:
                    row += len(found.node_id)
                    ids = found.node_id if found.node_id.type == kind else table_files.cast(found.node_id, kind)
                    yield Predictions(ids, found.probability_nC)

    return output.write(output.url, _told(chunks(), on_rows), jobs[0].student(), kind)


def _told(chunks: Chunks, on_rows: OnRows) -> Chunks:
    with closing(chunks):
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

    def work(url: str) -> int:
        return output.write(url, _told(job.chunks(), on_rows), job.student(), job.id_type())

    return write_once(output.url, name, work)


def _on_cluster(todo: list[tuple[Output, str, Job]], total: int, console: Console, address: str) -> list[int]:
    from rbm_dist.config.run import ClusterConfig
    from rbm_dist.runtime.cluster import ray_cluster
    from rbm_dist.runtime.mailbox import start_mailbox
    from rbm_dist.runtime.progress import ProgressRelay
    from rbm_dist.runtime.tasks import run_tasks

    cluster = ClusterConfig()
    with (
        ray_cluster(cluster, address),
        ProgressBars(console) as bars,
        ProgressRelay(start_mailbox(), bars) as relay,
    ):
        arguments = ((*each, relay.reporter, total) for each in todo)
        return run_tasks(_LOOP, _task, arguments, cluster)


def _task(output: Output, name: str, job: Job, reporter: Any, total: int) -> int:
    with threadpool_limits(1):
        return _once(output, name, job, lambda rows: reporter.add(_LOOP, rows, total, "rows"))
