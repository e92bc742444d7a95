"""What went wrong in a task, an actor or a worker, as an error that a person sees, and whether to try again."""

import re

from ray.exceptions import RayError, RayTaskError

from rbm_dist.errors import InputError, RunError

# What a worker raises when it is another that died: torch has no class of its own for most of it.
_OF_PEERS = ("gloo", "nccl", "connection", "socket", "timed out", "broken pipe", "process group", "reset by peer")


class LostError(RunError):
    """A process, a host, or the way there was lost: the same may well succeed. `what`: this, without advice."""

    def __init__(self, what: str):
        super().__init__(f"{what}. Run the same command again to go on from the last checkpoint")
        self.what = what


def explain(error: BaseException, stage: str) -> InputError | RunError:
    """The error for a person; the original's text is kept when its cause is not one we know.

    A `LostError` if the same may succeed when it is tried again.
    """
    # Imported here, where something failed anyway: it takes a second of every worker that would start with it.
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    causes: dict[str, BaseException] = {"": error}
    if isinstance(error, WorkerGroupError):
        causes = {f"rank {rank}": failure for rank, failure in error.worker_failures.items()}
    elif isinstance(error, ControllerError):
        causes = {"": error.controller_failure}
    named = {who: _root(cause) for who, cause in causes.items()}
    for cause in named.values():
        if isinstance(cause, InputError):
            return cause
    # Other ranks say no more than that one is gone: what is said first is what has a cause of its own.
    own = {who: cause for who, cause in named.items() if not _is_loss(cause)}
    details = "; ".join(f"{who}: {_text(cause)}" if who else _text(cause) for who, cause in (own or named).items())
    if any(_is_out_of_memory(cause) for cause in named.values()):
        return RunError(
            f"{stage}: out of memory: {details}. Take a smaller batch_size or more workers; `rbm-dist plan` says what "
            "each stage takes. The same command then goes on"
        )
    if own:
        return RunError(f"{stage}: {details}. It would fail again; once mended, the same command goes on")
    return LostError(f"{stage}: {details}")


def _is_loss(cause: BaseException) -> bool:
    """Whether this came from outside: a lost process or host, a peer's end, a deadline, storage."""
    from ray.train.v2._internal.exceptions import RayTrainError

    if isinstance(cause, (OSError, TimeoutError, RunError)):
        return True
    if isinstance(cause, (RayError, RayTrainError)):
        return not _is_out_of_memory(cause)
    return isinstance(cause, RuntimeError) and any(word in str(cause).lower() for word in _OF_PEERS)


def _is_out_of_memory(cause: BaseException) -> bool:
    # By name: a GPU's, of torch; a host's, of Ray, which ends processes before the kernel would.
    return isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"


def _root(error: BaseException) -> BaseException:
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else getattr(error, "_base_exc", None)
        inner = inner or getattr(error, "health_check_failure", None) or error.__cause__
        if inner is None or inner is error:
            return error
        error = inner


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())[:2000]
    if type(error) is RuntimeError and _is_loss(error):  # gloo adds its own source file, and guesses
        return re.sub(r"^\[\S+:\d+\] ", "", text).split(". This is typically")[0]
    return f"{type(error).__name__}: {text}"
