"""The commands.

Exit codes: 0 done, 1 the run failed or does not fit, 2 the input cannot be used, 130 interrupted, 143 terminated.
"""

import signal
import sys
import threading

from rich.console import Console
from rich.markup import escape

from rbm_dist.cli import runs, searches, students, watch  # noqa: F401 - their commands
from rbm_dist.cli.app import app
from rbm_dist.errors import InputError, RunError


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
