"""The two ways a run ends badly, each with an exit code of its own.

Everything a person can cause (a bad file, a bad key, a full disk) is an `InputError`: one message, no traceback.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """What the user gave cannot be used. The message says what was wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """The run was asked for correctly but did not finish (a lost worker, a missed deadline). Exit code 1."""


def disk_full(error: OSError, path: str) -> InputError | None:
    """The message for this host's disk (or quota) that filled up while `path` was written; None for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{path}: no space left on the device of {socket.gethostname()}; free some and run the same command again"
        )
    return None


@contextmanager
def disk_full_here() -> Iterator[None]:
    """In this block a disk that fills up is an `InputError` that names this host, wherever it arrives."""
    try:
        yield
    except OSError as error:
        raise disk_full(error, str(error.filename or "a file")) or error from None
