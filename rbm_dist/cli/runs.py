"""Runs: all stages, one of them, what they would take, what they are configured to."""

import json
from typing import Annotated, Literal

import typer
import yaml
from rich.console import Console

from rbm_dist.cli.app import Address, ConfigPath, Overrides, Overwrite, app, refuse_other_file
from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError


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


@app.command()
def update(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run; it stays as it is.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the section cluster.", show_default=False),
    ] = None,
    *,
    out: Annotated[str, typer.Option(help="The run directory to write.", show_default=False)],
    add_nodes: Annotated[str | None, typer.Option(help="New nodes: file, folder or pattern.")] = None,
    add_edges: Annotated[str | None, typer.Option(help="New edges.")] = None,
    drop_edges: Annotated[str | None, typer.Option(help="Edges that are gone.")] = None,
    features: Annotated[str | None, typer.Option(help="Nodes of the graph whose features are others now.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Column of node ids; default: as in training.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of new nodes' classes, where there is one.")] = None,
    split: Annotated[str | None, typer.Option(help="Column of new nodes' split, where there is one.")] = None,
    src: Annotated[str | None, typer.Option(help="Column of the edges' sources; default: as in training.")] = None,
    dst: Annotated[str | None, typer.Option(help="Column of the edges' destinations.")] = None,
    unknown_nodes: Annotated[
        Literal["refuse", "drop"], typer.Option(help="Edges to ids that are neither new nor the graph's.")
    ] = "refuse",
    epochs: Annotated[int, typer.Option(min=0, help="Students are trained so much further; 0: not at all.")] = 5,
    anew_above: Annotated[
        float, typer.Option(min=0, max=1, help="Share of changed nodes above which all is trained anew.")
    ] = 0.1,
    address: Address = None,
    overwrite: Overwrite = False,
) -> None:
    """Go on from a finished run when its graph has changed: only what can differ is computed. Again: it goes on."""
    from rbm_dist.config.load import updated
    from rbm_dist.config.update import UpdateConfig
    from rbm_dist.report.table import results_table
    from rbm_dist.report.update_table import update_table
    from rbm_dist.stages.finished import open_results
    from rbm_dist.stages.pipeline import run_stages
    from rbm_dist.stages.update import update_facts

    if not (add_nodes or add_edges or drop_edges or features):
        raise InputError("nothing has changed: give --add-nodes, --add-edges, --drop-edges or --features")
    changes = UpdateConfig(
        run=run, add_nodes=add_nodes, add_edges=add_edges, drop_edges=drop_edges, features=features, id=id_,
        label=label, split=split, src=src, dst=dst, unknown_nodes=unknown_nodes, epochs=epochs, anew_above=anew_above,
    )  # fmt: skip
    config = updated(run, out, changes, overrides)
    before = open_results(run)
    console = Console()
    console.print(f"[bold]rbm-dist[/] update {run} → {config.run_dir}", highlight=False)
    try:
        results = run_stages(config, console, address=address, overwrite=overwrite)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    assert results is not None
    console.print(results_table(results))
    console.print(update_table(update_facts(config.run_dir), before, results), highlight=False)


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
        refuse_other_file(json_file, json_file, "problems", "--json")
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
