"""Work that all ranks do, or none: what fails on one rank is an error on all of them, so that none waits for it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed.checkpoint as dcp

from rbm_dist.errors import InputError, RunError, disk_full
from rbm_dist.parallel.mesh import Mesh

_KINDS = (InputError, RunError)


@contextmanager
def together(mesh: Mesh, doing: str, at: str | None = None) -> Iterator[None]:
    """A block that every rank runs; after it, all go on, or all raise the first rank's error, with its rank and host.

    `doing`: what the block does, for the message; `at`: what it writes on this host, if that is another place. Raises
    `InputError` for what the user can change (a full disk), else `RunError`: the same may work another time. The block
    may wait for other ranks only where these cannot have failed.
    """
    failure: tuple[int, str] | None = None
    cause: BaseException | None = None
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        cause = error
        failure = _explain(error, mesh.rank, doing, at or doing)
    first = next((each for each in mesh.gather(failure) if each is not None), None)
    if first is not None:
        kind, text = first
        raise _KINDS[kind](text) from cause
    if cause is not None:  # of no rank, as `torch.distributed.checkpoint` has it
        raise cause


def _explain(error: BaseException, rank: int, doing: str, at: str) -> tuple[int, str] | None:
    """Kind of error and message; None where `torch.distributed.checkpoint` says that it was another rank's."""
    if isinstance(error, dcp.CheckpointException):
        if rank not in error.failures:
            return None
        error = error.failures[rank][0]
    if isinstance(error, OSError):
        error = disk_full(error, str(error.filename or at)) or error
    text = str(error) if isinstance(error, _KINDS) else f"{type(error).__name__}: {error}"
    return int(not isinstance(error, InputError)), f"{doing}: rank {rank} on {socket.gethostname()}: {text}"
