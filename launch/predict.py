"""Run `rbm-dist predict` as a job on a Ray cluster: an input file, or a part of the graph, is a task there.

Options that are not listed are those of `rbm-dist predict`. Exit codes are the command's, see `jobs.py`.
"""

from typing import Annotated

import typer

from launch.jobs import DEFAULT_ADDRESS, JobServer, main, run_job
from rbm_dist.config.load import absolute_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def predict(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, or an exported student.")],
    out: Annotated[str, typer.Option(help="The folder to write.")],
    nodes: Annotated[str | None, typer.Option(help="New nodes: file, folder or pattern.")] = None,
    edges: Annotated[str | None, typer.Option(help="Their edges to the graph's nodes.")] = None,
    graph: Annotated[str | None, typer.Option(help="The run whose graph that is; default: RUN.")] = None,
    address: JobServer = DEFAULT_ADDRESS,
) -> None:
    """Predict on a Ray cluster, and show the log. Submit it again to go on."""
    arguments = ["predict", absolute_path(run), *context.args, "--address", "auto"]
    # A path means here what it means in the folder of the submission.
    for option, path in (("--out", out), ("--nodes", nodes), ("--edges", edges), ("--graph", graph)):
        if path is not None:
            arguments += [option, absolute_path(path) + "/" * path.endswith("/")]
    raise typer.Exit(run_job(arguments, [], address, absolute_path(out)))


if __name__ == "__main__":
    main(app)
