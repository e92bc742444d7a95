"""Watching: how far a run is, whether hosts are well, checkpoints."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rbm_dist.cli.app import app


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
