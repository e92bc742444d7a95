"""Many runs: comparing students, searching hyper-parameters."""

from typing import Annotated

import typer
import yaml
from rich.console import Console

from rbm_dist.cli.app import Address, ConfigPath, Overrides, app


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
