"""Checkpoints that are written while training goes on: a copy of the state in CPU memory, and a thread.

`torch.distributed.checkpoint.async_save` would be the copy and a thread for the files alone; here the thread also
copies them to storage, and ends with the index. It talks to the other ranks' threads over a group of its own. The copy
is a plain one: `DefaultStager` (torch 2.13) loses storages that are seen through `detach` or a `DTensor`.
"""

import threading
from collections.abc import Callable

from torch import Tensor

from rbm_dist.errors import RunError

Save = Callable[[dict[str, Tensor]], None]


class BackgroundSave:
    """One checkpoint at a time. `what`: for messages. timeout_s: longest wait for one that is being written."""

    def __init__(self, what: str, timeout_s: float):
        self._what, self._timeout_s = what, timeout_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, state: dict[str, Tensor], save: Save) -> None:
        """Copy the state, and call `save` with the copy in a thread. Waits for the one before."""
        self.wait()
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        # A daemon: the interpreter would wait for ever at exit if storage did not answer.
        self._thread = threading.Thread(target=self._run, args=(save, copied), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong, and `RunError` after the deadline."""
        if self._thread is not None:
            self._thread.join(self._timeout_s)
            if self._thread.is_alive():
                raise RunError(
                    f"{self._what}: a checkpoint was not written within {self._timeout_s:g} s; if storage is only "
                    "slow, raise cluster.collective_timeout_s"
                )
            self._thread = None
        if self._error is not None:
            raise self._error

    def linger(self, seconds: float) -> None:
        """Until nothing is being written, or for so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def writing(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once."""
        return self._error is not None

    def _run(self, save: Save, copied: dict[str, Tensor]) -> None:
        try:
            save(copied)
        except BaseException as error:  # for the thread that trains
            self._error = error
