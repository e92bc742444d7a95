"""The commands.

Exit codes: 0 done, 1 the run failed or does not fit, 2 the input cannot be used, 130 interrupted, 143 terminated.
"""

import json
import signal
import sys
import threading
from contextlib import suppress
from fnmatch import fnmatch
from typing import Annotated, Literal

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from rbm_dist import __version__
from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError, RunError

app = typer.Typer(
    help="Distil a graph neural network into a small, graph-free mixture of experts.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Set any key, such as student.num_experts=16.", show_default=False),
]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster that is there (also RAY_ADDRESS); default: a local one for this run.")
]
Overwrite = Annotated[bool, typer.Option(help="Compute again what was made with another configuration.")]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read what is done and compare checksums, not sizes and times of change alone."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing: say what would be done, where, and what is missing.")
    ] = False,
) -> None:
    """Run all stages: source, partition, teacher, soft labels, encodings, student, evaluate. Run it again to go on."""
    if not dry_run:
        return _run_until("evaluate", config, overrides, address, overwrite, verify)
    if overwrite:
        raise InputError("--dry-run says what is done without --overwrite; give one of them")
    loaded = load(config, overrides)
    console = Console()
    console.print(f"[bold]rbm-dist[/] {config} → {loaded.run_dir}: a dry run; nothing is started", highlight=False)
    from rbm_dist.stages.dry_run import dry_run as look

    if not look(loaded, console, address):
        raise typer.Exit(1)


def _run_until(
    stage: str,
    config_path: str,
    overrides: list[str] | None,
    address: str | None,
    overwrite: bool,
    verify: bool = False,
) -> None:
    config = load(config_path, overrides)
    console = Console()
    console.print(f"[bold]rbm-dist[/] {config_path} → {config.run_dir}", highlight=False)
    # Imported late: `--help` and refusals need neither torch nor Ray.
    from rbm_dist.report.table import results_table
    from rbm_dist.stages.pipeline import run_stages

    try:
        results = run_stages(config, console, stage, address, overwrite, verify)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    if results is not None:
        console.print(results_table(results))


def _stage_command(stage: str, name: str, text: str) -> None:
    @app.command(name=name, help=f"{text} Runs the stages before it where they are not done yet.")
    def command(
        config: ConfigPath, overrides: Overrides = None, address: Address = None, overwrite: Overwrite = False
    ) -> None:
        _run_until(stage, config, overrides, address, overwrite)


@app.command()
def source(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write nothing: a look at headers and first rows."),
    ] = False,
) -> None:
    """Read and check the input graph, and say how it was understood."""
    if not dry_run:
        return _run_until("source", config, overrides, address, overwrite)
    loaded = load(config, overrides)
    from rbm_dist.report.source_table import source_table
    from rbm_dist.sources.dry_run import dry_run as look

    console = Console()
    console.print(f"[bold]rbm-dist[/] {config}: a look at the input; nothing is written", highlight=False)
    summary, note = look(loaded.source, loaded.seed)
    console.print(source_table(summary), highlight=False)
    console.print(f"    {note}", highlight=False)


_stage_command("partition", "partition", "Cut the graph into parts and write the shards.")
_stage_command("teacher", "teacher", "Train the GNN teacher.")
_stage_command("soft_labels", "soft-labels", "Write the teacher's class distribution for every node.")
_stage_command("encodings", "encodings", "Compute the configured positional encodings and propagated labels.")
_stage_command("student", "student", "Train the students on the soft labels.")
_stage_command("evaluate", "evaluate", "Measure accuracy, latency and expert load.")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    hosts: Annotated[int, typer.Option(min=1, help="Machines, all alike.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB of each; default: of this one.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each.")] = 0,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores of each; default: of this one.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write it as JSON.")] = None,
) -> None:
    """Estimate disk, memory, network and time of each stage before anything runs. Exit code 1: it would not fit."""
    loaded = load(config, overrides)
    from rbm_dist import storage

    if json_file and storage.is_file(json_file):
        _refuse_other_file(json_file, json_file, "problems", "--json")
    from rbm_dist.report.plan_table import plan_table
    from rbm_dist.sources.facts import source_facts
    from rbm_dist.stages.plan import make_plan, these_hosts

    facts = source_facts(loaded.source, loaded.seed)
    made = make_plan(loaded, facts, these_hosts(loaded.run_dir, hosts, memory, cores, gpus)).as_json()
    if json_file:
        storage.write_json(json_file, made)
    Console().print(plan_table(made), highlight=False)
    if made["problems"]:
        raise typer.Exit(1)


def _refuse_other_file(url: str, known_by: str, key: str, option: str) -> None:
    """Raise `InputError` for a file that would be written over, unless a JSON mapping with this key is there."""
    from rbm_dist import storage

    with suppress(InputError, OSError):
        found = storage.read_json(known_by)
        if isinstance(found, dict) and key in found:
            return
    raise _would_be_written_over(url, option)


def _would_be_written_over(url: str, option: str) -> InputError:
    return InputError(f"{url}: would be written over and is not rbm-dist's; name another place ({option})")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run directory.", show_default=False)],
    out: Annotated[str, typer.Option(help="The folder to write; any fsspec URL.", show_default=False)],
    model: Annotated[str, typer.Option(help="Which of the run's students.")] = "rbm",
) -> None:
    """Write a student as a folder that needs neither graph nor Ray nor torch: weights, ONNX, how rows are read."""
    from rbm_dist import storage
    from rbm_dist.serve.export import export as export_student
    from rbm_dist.serve.from_run import read_run

    made = export_student(storage.absolute(out), *read_run(run, model))
    size = sum(info["bytes"] for info in made.files.values())
    Console().print(f"{model} of {run} → {out}: {', '.join(made.files)}, {size:,} bytes", highlight=False)


@app.command()
def compress(
    student: Annotated[str, typer.Argument(metavar="FOLDER", help="An exported student.", show_default=False)],
    out: Annotated[str, typer.Option(help="The folder to write.", show_default=False)],
    int8: Annotated[bool, typer.Option("--int8", help="Weights in int8: a quarter of the bytes.")] = False,
    prune: Annotated[int | None, typer.Option(min=1, metavar="N", help="Keep the N experts that do most.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="The MLP that the experts average to.")] = False,
    max_loss: Annotated[float, typer.Option(min=0, help="Points of validation accuracy that it may cost.")] = 0.5,
    run: Annotated[str | None, typer.Option(help="Measure on the validation nodes of the run it is of.")] = None,
    nodes: Annotated[str | None, typer.Option(help="Measure on a table of rows with labels.")] = None,
    label: Annotated[str, typer.Option(help="That table's column of classes.")] = "label",
) -> None:
    """Make a smaller student of an exported one. Exit code 1: it would lose too much, and nothing is written.

    There is no low-rank form: it costs a row more than a whole expert does, see docs/compression.md.
    """
    from rbm_dist import storage
    from rbm_dist.report.compression_table import compression_table
    from rbm_dist.serve import compress as compress_
    from rbm_dist.serve import format as format_
    from rbm_dist.serve import validation
    from rbm_dist.serve.loaded import read_weights

    if int8 + merge + (prune is not None) != 1:
        raise InputError("say what to do: one of --int8, --prune N and --merge")
    if (run is None) == (nodes is None):
        raise InputError("say what to measure on: the run that the student is of (--run) or labelled rows (--nodes)")
    url, target = storage.absolute(student), storage.absolute(out)
    if url == target:
        raise InputError(f"{out}: is the student itself; name another folder (--out)")
    model = format_.read(url)
    tensors = read_weights(url, model)
    if run is not None:
        from rbm_dist.stages.finished import graph_of

        labelled = validation.from_graph(graph_of(run, model.name, ("label", "split")), model)
    else:
        assert nodes is not None
        labelled = validation.from_table(nodes, label, model, tensors)
    if int8:
        smaller = compress_.in_int8(model, tensors)
    elif prune is not None:
        smaller = compress_.pruned(model, tensors, prune, labelled.rows_BD)
    else:
        smaller = compress_.merged(model, tensors)
    made = compress_.compress(target, (model, tensors), smaller, labelled, max_loss)
    assert made.compressed is not None
    Console().print(compression_table(made.compressed))
    Console().print(f"{student} → {out}: {', '.join(made.files)}", highlight=False)


@app.command()
def predict(
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="A finished run, or an exported student.", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="The .parquet or .csv file, or the folder, to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Which of the run's students.")] = "rbm",
    nodes: Annotated[
        str | None, typer.Option(help="New nodes: file, folder or pattern; default: those of the run's graph.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only so many classes of each node; default: all.")] = None,
    format_: Annotated[
        Literal["parquet", "csv"] | None, typer.Option("--format", help="Of the files in a folder; default: parquet.")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Column of node ids; default: as in training.")] = None,
    row_numbers: Annotated[bool, typer.Option("--row-numbers", help="Node ids are row numbers.")] = False,
    id_type: Annotated[
        Literal["auto", "integer", "text"], typer.Option(help="What ids of text files are; auto: as in training.")
    ] = "auto",
    delimiter: Annotated[str | None, typer.Option(help="Of text files; default: looked for.")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether text files have one; default: they do.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf8",
    edges: Annotated[
        str | None, typer.Option(help="Edges between new nodes and the graph's: file, folder or pattern.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(help="The run whose graph edges lead to; default: RUN.", metavar="RUN")
    ] = None,
    src: Annotated[str, typer.Option(help="Column of the edges' sources.")] = "src",
    dst: Annotated[str, typer.Option(help="Column of the edges' destinations.")] = "dst",
    unknown_nodes: Annotated[
        Literal["refuse", "drop"], typer.Option(help="Edges to ids that are neither new nor the graph's.")
    ] = "refuse",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster, or `local`; a file is a task. Default: in this process.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Make a folder's other predictions again.")] = False,
) -> None:
    """Write class and probabilities of new nodes, or of every node of the run's graph, with their own ids."""
    from rbm_dist.serve.tables import ReadOptions
    from rbm_dist.serve.unseen import EdgeOptions
    from rbm_dist.stages.predict import predict_graph, predict_tables

    console = Console()
    try:
        if nodes is None:
            rows = predict_graph(
                run, model, out, console, top_k=top_k, format_=format_, address=address, overwrite=overwrite
            )
        else:
            reading = ReadOptions(id_, row_numbers, id_type, delimiter, header, encoding)
            ends = EdgeOptions(edges, graph or run, src, dst, unknown_nodes) if edges else None
            rows = predict_tables(
                run, model, nodes, out, reading, ends, console, top_k=top_k, format_=format_, address=address,
                overwrite=overwrite,
            )  # fmt: skip
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    console.print(f"{rows:,} predictions of {model} → {out}", highlight=False)


@app.command()
def serve(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]FOLDER...", help="Exported students; any fsspec URLs.", show_default=False),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen at; others need RBM_DIST_SERVE_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; the first line says which.")] = 8000,
    engine: Annotated[
        Literal["auto", "native", "onnx"], typer.Option(help="native: numpy and Numba; onnx: ONNX Runtime.")
    ] = "auto",
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of one request.")] = 8 << 20,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of one request.")] = 4096,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests at once; more are answered with 429.")] = 256,
    drain: Annotated[float, typer.Option(min=0, help="Seconds between SIGTERM and the end of listening.")] = 2.0,
    without_token: Annotated[bool, typer.Option("--without-token", help="Serve others without asking.")] = False,
) -> None:
    """Answer over HTTP with exported students: Open Inference Protocol, and /predict. Exit code 0 on SIGTERM."""
    try:
        from rbm_dist.serve import server
        from rbm_dist.serve.http import Limits
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}, which is not installed: pip install 'rbm-dist[serve]'") from None
    limits = Limits(max_body=max_body, max_rows=max_rows, max_waiting=max_waiting)
    server.serve(folders, engine, host, port, limits, drain, without_token)


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run directory.", show_default=False)],
    out: Annotated[str | None, typer.Option(help="The folder to write; default: RUN/inspect.")] = None,
) -> None:
    """Show what the experts of the RbM do: tables, and as files all figures and a picture per layer."""
    from rbm_dist import storage
    from rbm_dist.report.expert_pictures import layer_picture, png
    from rbm_dist.report.expert_table import expert_tables
    from rbm_dist.serve.experts import ARRAYS, expert_figures, input_maps
    from rbm_dist.serve.specialisation import mixture_figures
    from rbm_dist.stages.finished import open_mixture

    mixture, merged, store, seed = open_mixture(run, ARRAYS)
    folder = out or storage.join(storage.absolute(run), "inspect")
    for name in storage.listdir(folder):
        if name == "inspect.json" or fnmatch(name, "layer-*.png"):
            _refuse_other_file(storage.join(folder, name), storage.join(folder, "inspect.json"), "layers", "--out")
    figures = {
        **expert_figures(mixture, store, mixture.inputs),
        "mixture": {"merged": merged, **mixture_figures(mixture, store)},
    }
    maps = input_maps(mixture, store, mixture.inputs, seed)
    pictures = [
        png(layer_picture(index, layer, figures["class_share"], points, figures["class_names"]))
        for index, (layer, points) in enumerate(zip(figures["layers"], maps, strict=True))
    ]
    storage.write_json(storage.join(folder, "inspect.json"), figures)  # first: by it the pictures are known
    for index, picture in enumerate(pictures):
        with storage.atomic_writer(storage.join(folder, f"layer-{index}.png")) as stream:
            stream.write(picture)
    Console().print(expert_tables(figures))
    Console().print(f"inspect.json and layer-*.png, {len(pictures)} in all → {folder}", highlight=False)


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory; any fsspec URL.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, for programs.")] = False,
) -> None:
    """Say how far a run is, also while it is at work. Exit code 1: it is unfinished, and nobody is at work on it."""
    from rbm_dist.report.status_table import status_table
    from rbm_dist.stages.status import run_status

    found = run_status(run)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(status_table(found), highlight=False)
    if found["state"] in ("stopped", "gone"):
        raise typer.Exit(1)


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster to look at; default: this machine alone.")
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="Also write and read there; any fsspec URL.")] = None,
) -> None:
    """Look at every host of a cluster: versions, GPUs, network, disks, clocks, storage. Exit code 1: one is wrong."""
    from rbm_dist.report.doctor_table import WRONG, doctor_table, judged
    from rbm_dist.runtime.doctor import examine

    lines = judged(examine(address, run_dir))
    Console().print(doctor_table(lines), highlight=False)
    if any(line.verdict == WRONG for each in lines.values() for line in each):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run directory.", show_default=False)],
    out: Annotated[str | None, typer.Option(help="The HTML file to write; default: RUN/report.html.")] = None,
) -> None:
    """Show a finished run as one HTML page: accuracies, curves, experts, latencies, times, graph, configuration."""
    from rbm_dist import storage
    from rbm_dist.report.html import is_report, report_page
    from rbm_dist.report.plan_table import size
    from rbm_dist.stages.report import run_facts

    page = out or storage.join(storage.absolute(run), "report.html")
    if storage.exists(page) and not is_report(page):
        raise _would_be_written_over(page, "--out")
    content = report_page(run_facts(run)).encode()
    with storage.atomic_writer(page) as stream:
        stream.write(content)
    Console().print(f"{size(len(content))} → {page}", highlight=False)


@app.command()
def experiment(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; default: all CPUs but one.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Run nothing: write the tables of what is done.")] = False,
) -> None:
    """Run datasets × settings × students × objectives × seeds; write their tables. Run it again to go on."""
    from rbm_dist.config.experiment import load_experiment

    loaded, trials = load_experiment(config, overrides)
    console = Console()
    console.print(f"[bold]rbm-dist[/] {config} → {loaded.run_dir}: {len(trials):,} runs", highlight=False)
    from rbm_dist.report.experiment import accuracy_tables
    from rbm_dist.stages.experiment import run_experiment, write_tables

    try:
        rows = write_tables(loaded, trials) if tables else run_experiment(loaded, trials, console, address, jobs)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    console.print(accuracy_tables(rows, len(loaded.seeds)))
    console.print(f"results.md, .csv and .parquet: {len(rows):,} of {len(trials):,} runs → {loaded.run_dir}")


@app.command()
def tune(
    config: ConfigPath,
    space: Annotated[
        str,
        typer.Argument(metavar="SPACE", help="What is searched, see docs/tune.md.", show_default=False),
    ],
    overrides: Overrides = None,
    address: Address = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trials at once; default: all CPUs but one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Search anew what was searched in another way.")] = False,
) -> None:
    """Search hyper-parameters by Ray Tune, on validation accuracy alone. Run it again to go on."""
    from rbm_dist.config.tune import load_search

    search = load_search(config, space, overrides)
    names, trials = [each.name for each in search.candidates], search.settings.trials
    console = Console()
    count = f"{trials:,} trials of {', '.join(names)}"
    console.print(f"[bold]rbm-dist[/] {config} × {space} → {search.run_dir}: {count}", highlight=False)
    from rbm_dist.report.tune import best, search_table
    from rbm_dist.stages.trials import differing_keys
    from rbm_dist.stages.tune import run_search

    try:
        rows = run_search(search, console, address, jobs, overwrite)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    console.print(search_table(rows, names, trials, len(search.seeds)))
    winner = best(rows)
    if winner:
        console.print(f"the best, {winner['student']}, differs from {config} in:", highlight=False, soft_wrap=True)
        print(yaml.safe_dump(differing_keys(search, winner), sort_keys=False), end="")
    console.print(f"best.yaml, best-<student>.yaml, trials.csv and .parquet → {search.run_dir}", highlight=False)


checkpoints = typer.Typer(help="The checkpoints of a run's training loops.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoint")
AnyRun = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, finished or not.", show_default=False)]


@checkpoints.command()
def ls(run: AnyRun) -> None:
    """List them: loop, step, epochs, time, size, ranks that wrote, owner's token, whether whole, best epoch so far."""
    from rbm_dist.report.checkpoint_table import checkpoint_table
    from rbm_dist.stages.run_checkpoints import run_checkpoints

    Console().print(checkpoint_table(run_checkpoints(run)))


@checkpoints.command()
def verify(run: AnyRun) -> None:
    """Read all of them and compare checksums. Exit code 1: some are damaged; they are named."""
    from rbm_dist.stages.run_checkpoints import run_checkpoints

    console, found = Console(), run_checkpoints(run, hashes=True)
    for each in found:
        for line in each.wrong:
            console.print(f"[red]{each.state}[/] {escape(line)}", highlight=False, soft_wrap=True)
    whole = sum(each.state == "yes" for each in found)
    console.print(f"{whole} of {len(found)} checkpoints are whole", highlight=False)
    raise typer.Exit(int(any(each.state == "damaged" for each in found)))


@checkpoints.command()
def consolidate(
    run: AnyRun,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write.", show_default=False)],
    loop: Annotated[str | None, typer.Option(help="Of this loop, as `ls` names it; default: of all.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="That of a step; default: the newest.")] = None,
) -> None:
    """Write one as a safetensors file of whole tensors, whatever wrote it, and its facts as JSON beside it."""
    from rbm_dist.stages.run_checkpoints import consolidate as write_one

    made = write_one(run, out, loop, step)
    Console().print(f"{made.loop}, {made.folder} → {out}", highlight=False, soft_wrap=True)


@app.command(name="config")
def show_config(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", show_default=False)] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Print the whole resolved configuration, defaults included."""
    if schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
    elif config is None:
        raise InputError("name a configuration file, or give --schema")
    else:
        print(yaml.safe_dump(load(config, overrides).model_dump(mode="json"), sort_keys=False), end="")


@app.callback(invoke_without_command=True)
def version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command; errors are one message on standard error and a true exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except (InputError, RunError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except SystemExit:
        if _terminated.is_set():
            sys.exit(_TERMINATED)
        raise


_TERMINATED = 128 + signal.SIGTERM
_terminated = threading.Event()


def _terminate(*_: object) -> None:
    # An exception, so that a local Ray is stopped on the way out; where it waits, Ray makes the exit code a 1.
    _terminated.set()
    raise SystemExit(_TERMINATED)
