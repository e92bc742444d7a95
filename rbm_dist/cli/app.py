"""The application that all commands belong to, and what several of them take."""

from contextlib import suppress
from typing import Annotated

import typer

from rbm_dist import __version__
from rbm_dist.errors import InputError

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


def refuse_other_file(url: str, known_by: str, key: str, option: str) -> None:
    """Raise `InputError` for a file that would be written over, unless a JSON mapping with this key is there."""
    from rbm_dist import storage

    with suppress(InputError, OSError):
        found = storage.read_json(known_by)
        if isinstance(found, dict) and key in found:
            return
    raise would_be_written_over(url, option)


def would_be_written_over(url: str, option: str) -> InputError:
    return InputError(f"{url}: would be written over and is not rbm-dist's; name another place ({option})")


@app.callback(invoke_without_command=True)
def version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit
