"""What workers log, sent to the driver, which shows it above its progress bars: warnings, and what we say ourselves."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray

from rbm_dist.runtime.liveness import MAILBOX

_ANSWER_S = 5.0  # longest wait for the mailbox


@contextlib.contextmanager
def warnings_of(who: str) -> Iterator[None]:
    """Forward the warnings of this block, which a process works at that may end with it."""
    forwarder = forward_warnings(who)
    try:
        yield
    finally:
        forwarder.wait()


def forward_warnings(who: str) -> "_Forwarder":
    """From now on what this process logs is shown by the driver too, as said by `who`: of others, warnings or worse."""
    root = logging.getLogger()
    logging.getLogger("rbm_dist").setLevel(logging.INFO)
    forwarder = next((each for each in root.handlers if isinstance(each, _Forwarder)), None)
    if forwarder is None:
        forwarder = _Forwarder()
        root.addHandler(forwarder)
    forwarder.who = who
    return forwarder


class _Forwarder(logging.StreamHandler):
    """Writes to stderr, that is to Ray's logs of this node, and into the mailbox."""

    who = ""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("rbm_dist."))
        self._mailbox: Any = None
        self._sent: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with contextlib.suppress(Exception):  # no driver listens
            self._mailbox = self._mailbox or ray.get_actor(MAILBOX)
            text = record.getMessage() + (f": {record.exc_info[1]!r}" if record.exc_info else "")
            place = f"{record.name}:{record.lineno}"
            message = {"who": self.who, "text": text, "place": place, "warns": record.levelno >= logging.WARNING}
            self._sent = self._mailbox.put.remote({"kind": "log", **message})

    def wait(self) -> None:
        """Wait until what was sent has arrived."""
        sent, self._sent = self._sent, None
        if sent is not None:
            with contextlib.suppress(Exception):
                ray.get(sent, timeout=_ANSWER_S)

    async def arrived(self) -> None:
        """As `wait`, in an actor that goes on with other calls meanwhile."""
        sent, self._sent = self._sent, None
        if sent is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(sent, _ANSWER_S)
