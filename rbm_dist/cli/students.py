"""What becomes of a finished run: students that leave, predict, answer and are explained."""

from fnmatch import fnmatch
from typing import Annotated, Literal

import typer
from rich.console import Console

from rbm_dist.cli.app import app, refuse_other_file, would_be_written_over
from rbm_dist.errors import InputError


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
            refuse_other_file(storage.join(folder, name), storage.join(folder, "inspect.json"), "layers", "--out")
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
        raise would_be_written_over(page, "--out")
    content = report_page(run_facts(run)).encode()
    with storage.atomic_writer(page) as stream:
        stream.write(content)
    Console().print(f"{size(len(content))} → {page}", highlight=False)
