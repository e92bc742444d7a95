"""The two ways a run ends badly, each with an exit code of its own.

Everything a person can cause (a bad file, a bad key, a full disk) is an `InputError`: one message, no traceback.
"""

import errno


class InputError(Exception):
    """What the user gave cannot be used. The message says what was wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """The run was asked for correctly but did not finish (a lost worker, a missed deadline). Exit code 1."""


def disk_full(error: OSError, path: str) -> InputError | None:
    """The message for a disk (or quota) that filled up while `path` was written; None for any other `OSError`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{path}: no space left on the device; free some and run the same command again")
    return None
