"""What went wrong in a task, an actor or a worker, as one of the two errors that a person sees."""

from ray.exceptions import RayError, RayTaskError
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from rbm_dist.errors import InputError, RunError, disk_full


def explain(error: BaseException, stage: str) -> InputError | RunError:
    """The error for a person; the original's text is kept when its cause is not one we know."""
    causes: dict[str, BaseException] = {"": error}
    if isinstance(error, WorkerGroupError):
        causes = {f"rank {rank}": failure for rank, failure in error.worker_failures.items()}
    elif isinstance(error, ControllerError):
        causes = {"": error.controller_failure}
    named = {who: _root(cause) for who, cause in causes.items()}
    for cause in named.values():
        if isinstance(cause, InputError):
            return cause
        if isinstance(cause, OSError) and (full := disk_full(cause, str(cause.filename or "the run directory"))):
            return full
    details = "; ".join(f"{who}: {_text(cause)}" if who else _text(cause) for who, cause in named.items())
    return RunError(f"{stage}: {details}. Run the same command again to go on from the last checkpoint")


RAY_FAILURES = (RayError, TrainingFailedError)


def _root(error: BaseException) -> BaseException:
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else getattr(error, "_base_exc", None)
        inner = inner or error.__cause__
        if inner is None or inner is error:
            return error
        error = inner


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"
