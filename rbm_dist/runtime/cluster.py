"""A Ray cluster for the length of a run: one that is there, or a local one that starts and stops with the run."""

import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from rbm_dist.config.run import ClusterConfig
from rbm_dist.cpus import usable_cpus
from rbm_dist.errors import InputError

# Only handles and small arrays enter the object store; features and embeddings never do.
_OBJECT_STORE_BYTES = 128 * 2**20
_IDLE_S = 120  # a process of a task that ended waits for the next; importing is what takes time


# "HOST:PORT" or "ray://HOST:PORT"; anything else ("auto", "local") is for Ray to resolve.
_HOST_PORT = re.compile(r"(?:ray://)?(?P<host>[^:/\s]+):(?P<port>\d+)")
_CONNECT_S = 10.0

# The environment of a process that computes on one core, whatever library it uses.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def is_own(address: str | None) -> bool:
    """Whether Ray is started for this driver alone, as no address is given."""
    return not (address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def ray_cluster(config: ClusterConfig, address: str | None) -> Iterator[None]:
    """Connect to `address` (or `RAY_ADDRESS`), else start Ray here; disconnect, or stop it, at the end.

    Raises `InputError` if no cluster answers there.
    """
    address = None if is_own(address) else address or os.environ["RAY_ADDRESS"]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The driver prints its own progress; workers' warnings reach it through the mailbox, their errors as exceptions.
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_terminate = signal.getsignal(signal.SIGTERM)
    if address:
        _require_listener(address)
        with _standard_error() as said:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise InputError(_refusal(address, error, said())) from None
    else:
        # Logical CPUs: a laptop may run more workers than it has cores. One is spare: where all are taken, Ray lets
        # half a minute pass before it starts a lost actor again.
        cpus = max(usable_cpus(), config.most_workers + config.inference_workers) + 1
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES,
            _system_config={"idle_worker_killing_time_threshold_ms": 1000 * _IDLE_S}, **quiet,
        )  # fmt: skip
    # Ray puts a handler of its own in its place, which prints a stack and ends the process at once.
    if on_terminate is not None:
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        ray.shutdown()


def spare_cpus() -> int:
    """All but one, which Ray keeps for itself and the driver; asked each time, as a cluster grows."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)


def _refusal(address: str, error: Exception, said: str) -> str:
    """What to tell the user: Ray says in its log alone that it wants a token, once for each time it tries."""
    if "AuthToken" in said or "Unauthenticated" in said:
        return (
            f"the Ray cluster at {address} wants a token, and did not take ours: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"no Ray cluster answers at {address} (--address or RAY_ADDRESS): {reason}"


@contextmanager
def _standard_error() -> Iterator[Callable[[], str]]:
    """In this block what is written to standard error, by libraries in C++ too, is kept; shown if the block succeeds.

    Gives a function that tells what was written so far.
    """
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)

        def said() -> str:
            kept.seek(0)
            return kept.read().decode(errors="replace")

        try:
            yield said
            os.write(own, said().encode())
        finally:
            os.dup2(own, 2)
            os.close(own)


def _require_listener(address: str) -> None:
    """Ray itself waits for minutes for an address where nobody listens."""
    match = _HOST_PORT.fullmatch(address)
    if match:
        try:
            socket.create_connection((match["host"], int(match["port"])), timeout=_CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"no Ray cluster answers at {address} (--address or RAY_ADDRESS): {error}") from None
