"""Run `rbm-dist run` as a job on a Ray cluster: check the configuration here, send it and the package, show the log.

Exit codes are those of the run, see `jobs.py`; 2 is also a configuration that cannot be used.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.jobs import DEFAULT_ADDRESS, JobServer, main, run_job
from rbm_dist.config.load import load, locations
from rbm_dist.config.run import Config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Set any key, such as run_dir=/shared/run.", show_default=False),
    ] = None,
    address: JobServer = DEFAULT_ADDRESS,
    overwrite: Annotated[bool, typer.Option(help="Compute again what was made with another configuration.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Start no work: what would be done there, on which hosts; what is missing."),
    ] = False,
) -> None:
    """Run all stages as a job on a Ray cluster, and show its log. Submit it again to go on."""
    settings = load(config, overrides)
    path = Path(config)
    options = ["--overwrite"] * overwrite + ["--dry-run"] * dry_run
    arguments = ["run", path.name, *(overrides or []), *_paths(settings), *options]
    raise typer.Exit(run_job(arguments, [path], address, settings.run_dir))


def _paths(config: Config) -> list[str]:
    """Overrides that name the same local files from the folder of the job as from here."""
    # JSON is quoted YAML: a path with ': ' or '#' in it stays one string.
    return [f"{key}={json.dumps(path, ensure_ascii=False)}" for key, path in locations(config).items()]


if __name__ == "__main__":
    main(app)
