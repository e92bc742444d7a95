"""Signs of life: every process that works for a run says every few seconds that it is there, and how busy it was.

The mailbox keeps the last sign of each; a driver that waits looks at them. A process that is silent (stopped, or its
host in trouble) or idle for far too long is killed: Ray then sees at once what it would otherwise wait for in vain, and
starts the work again. So a task may take a day, and a hung one is found in a minute.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rbm_dist.config.run import ClusterConfig

MAILBOX = "progress"  # the mailbox's name among the actors of one driver
_EVERY_S = 2.0  # between two signs
_LOOK_S = 2.0  # between two looks of a driver
_ANSWER_S = 5.0  # longest wait for the mailbox
_KILL_S = 30.0  # longest wait for a host to end one of its processes
_BUSY = 0.01  # share of a core that work takes at least; a process of Ray that only waits takes a quarter of that
_log = logging.getLogger(__name__)


@dataclass
class Sign:
    """The last sign of one process that works for a run."""

    who: str
    host: str
    node_id: str
    pid: int
    computes: bool  # whether it is to be found hung when it does nothing
    cpu_s: float
    seen: float = 0.0  # by the mailbox's clock
    busy: float = 0.0  # when it was last seen to have worked


class Signs:
    """The mailbox's side: the last sign of each process, by its own clock."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Sign] = {}

    def add(self, sign: Sign) -> None:
        now, place = time.monotonic(), (sign.node_id, sign.pid)
        before = self._last.get(place)
        sign.seen = sign.busy = now
        same = before is not None and before.who == sign.who
        if before is not None and same and sign.cpu_s - before.cpu_s < _BUSY * (now - before.seen):
            sign.busy = before.busy
        self._last[place] = sign

    def drop(self, node_id: str, pid: int) -> None:
        self._last.pop((node_id, pid), None)

    def overdue(self, silence_s: float, idle_s: float) -> list[tuple[Sign, str]]:
        """Who was not heard of for so long, or does nothing though it computes; with the reason."""
        now, late = time.monotonic(), []
        for sign in self._last.values():
            if now - sign.seen > silence_s:
                late.append((sign, f"no sign of life for {silence_s:g} s"))
            elif sign.computes and now - sign.busy > idle_s:
                late.append((sign, f"did nothing for {idle_s:g} s"))
        return late

    def working(self, stage: str) -> bool:
        """Whether anybody works for a stage."""
        return any(sign.who.startswith(stage) for sign in self._last.values())


class LifeSigns:
    """A working process's side: a thread that sends signs from `start` to `stop`."""

    def __init__(self, who: str, computes: bool = False):
        self._who, self._computes = who, computes
        self._node_id = ray.get_runtime_context().get_node_id()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)

    def start(self) -> "LifeSigns":
        """The first sign has arrived when this returns: who hangs at once is missed, too."""
        with contextlib.suppress(Exception):  # nobody looks for signs, or the mailbox is about to start again
            ray.get(ray.get_actor(MAILBOX).sign.remote(self._sign()), timeout=_ANSWER_S)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            with contextlib.suppress(Exception):
                ray.get_actor(MAILBOX).sign.remote(self._sign())
        with contextlib.suppress(Exception):
            ray.get_actor(MAILBOX).drop.remote(self._node_id, os.getpid())

    def _sign(self) -> Sign:
        pid, host = os.getpid(), socket.gethostname()
        return Sign(self._who, host, self._node_id, pid, self._computes, time.process_time())


@contextlib.contextmanager
def signs_of_life(who: str, computes: bool = False) -> Iterator[None]:
    """Send signs of life while in this block.

    computes: whether it works without a rest; if not, it may wait for others, who have deadlines for it.
    """
    signs = LifeSigns(who, computes).start()
    try:
        yield
    finally:
        signs.stop()


class Watch:
    """The driver's side, for the length of a wait: `look` as often as you like."""

    def __init__(self, cluster: ClusterConfig, stage: str):
        self._silence_s, self._idle_s = cluster.silence_timeout_s, cluster.collective_timeout_s
        self._stage = stage
        self._looked, self._worked = 0.0, time.monotonic()

    def look(self) -> float:
        """Kill whoever is overdue, and say so; Ray then starts its work again.

        Gives for how many seconds nobody has worked for the stage.
        """
        if time.monotonic() - self._looked > _LOOK_S:
            with contextlib.suppress(RayError, ValueError):  # no mailbox, or it is about to start again
                mailbox = ray.get_actor(MAILBOX)
                questions = [mailbox.overdue.remote(self._silence_s, self._idle_s), mailbox.working.remote(self._stage)]
                overdue, working = ray.get(questions, timeout=_ANSWER_S)
                for sign, reason in overdue:
                    _end(sign, reason)
                    mailbox.drop.remote(sign.node_id, sign.pid)
                if working:
                    self._worked = time.monotonic()
            self._looked = time.monotonic()
        return time.monotonic() - self._worked


def _end(sign: Sign, reason: str) -> None:
    if all(node["NodeID"] != sign.node_id for node in ray.nodes() if node["Alive"]):
        return  # the whole host is gone, and Ray knows
    there = NodeAffinitySchedulingStrategy(sign.node_id, soft=False)
    kill = ray.remote(num_cpus=0, memory=1, max_retries=0, scheduling_strategy=there)(_kill)
    try:
        killed = ray.get(kill.remote(sign.pid), timeout=_KILL_S)
    except RayError as error:
        text = "%s on %s: %s, and its host does not answer (%s)"
        _log.warning(text, sign.who, sign.host, reason, type(error).__name__)
        return
    if killed:
        _log.warning(
            "%s on %s: %s; its process (%d) was ended, and its work starts again", sign.who, sign.host, reason, sign.pid
        )


def _kill(pid: int) -> bool:
    """Whether there was such a process of Ray; its number may have gone to another."""
    try:
        if b"ray::" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        os.kill(pid, signal.SIGKILL)
    except (OSError, ProcessLookupError):
        return False
    return True
