"""Hosts that differ, on this machine: each has its own network address, processes, name, /tmp and /dev/shm.

A host is a set of Linux namespaces around a process of ours, its init. The switch that joins them is a bridge in a
network namespace of its own, so that nothing of a bed is seen outside, and beds never meet. Every init ends when its
standard input does, that is with this process, however that ends; with it the kernel ends all else of its host.
Needs root and iproute2.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tests.patience import patient

ROOT = Path(__file__).parents[2]
SHARED = "/mnt/shared"  # a folder that all hosts of a bed have
SCRATCH = "/mnt/scratch"  # a small disk of each host, where temporary files go
_NETWORK = "10.77.0"
_CLONE_NEWNET = 0x40000000
# Collects what others leave, says that it runs, and ends with its input.
_INIT_CODE = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); input()"
_INIT = (sys.executable, "-S", "-c", _INIT_CODE)
_SHM_MB = 256
_T = TypeVar("_T")


class Switch:
    """A bridge in a network namespace of its own, with the address 10.77.0.1."""

    def __init__(self) -> None:
        self._unshare, self._init = _start_init(["unshare", "--net", "--pid", "--fork", "--kill-child", *_INIT])
        self._threads = ThreadPoolExecutor(1, initializer=_enter_network, initargs=(self._init,))
        self.ip("link add bridge type bridge")
        self.ip(f"address add {_NETWORK}.1/24 dev bridge")
        self.ip("link set bridge up")

    def ip(self, arguments: str, program: str = "ip", check: bool = True) -> bool:
        """Whether it succeeded, which it must with `check`."""
        return run("nsenter", f"--target={self._init}", "--net", program, *arguments.split(), check=check)

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in a thread whose sockets are on the network of the hosts."""
        return self._threads.submit(function, *arguments).result()

    def close(self) -> None:
        self._threads.shutdown()
        _end_init(self._unshare, self._init)


class Host:
    """One host, running from the start. Its folder is its disk, which outlives `kill`.

    `scratch_mb` is the size of the disk of temporary files (TMPDIR).
    """

    def __init__(
        self, switch: Switch, number: int, name: str, folder: Path, shared: Path, environment: dict[str, str],
        scratch_mb: int,
    ):  # fmt: skip
        self.name, self.address, self.folder = name, f"{_NETWORK}.{number}", folder
        self._switch, self._shared, self._scratch_mb = switch, shared, scratch_mb
        self._entered: list[subprocess.Popen[str]] = []
        for each in ("tmp/home", "scratch"):
            (folder / each).mkdir(parents=True, exist_ok=True)
        (folder / "tmp").chmod(0o1777)
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": "/tmp/home",
            "TMPDIR": SCRATCH,
            "RAY_TMPDIR": "/tmp",
            **environment,
        }
        self.start()

    def start(self) -> None:
        """Power on."""
        setup = f"""
            hostname {self.name}
            mount -t tmpfs -o size={_SHM_MB}m,mode=1777 tmpfs /dev/shm
            mount -t tmpfs tmpfs /mnt
            mkdir {SHARED} {SCRATCH}
            mount --bind {self._shared} {SHARED}
            mount -t tmpfs -o size={self._scratch_mb}m tmpfs {SCRATCH}
            {self._keep_repository()}
            mount --rbind {self.folder}/tmp /tmp
            echo '127.0.0.1 localhost\n{self.address} {self.name}' > /mnt/hosts
            : > /mnt/resolv.conf
            mount --bind /mnt/hosts /etc/hosts
            mount --bind /mnt/resolv.conf /etc/resolv.conf
            ip link set lo up
            exec "$@"
        """
        unshared = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._unshare, self._init = _start_init([*unshared, "sh", "-ec", setup, "sh", *_INIT])
        self._port = f"to-{self.name}"
        self._switch.ip(f"link add {self._port} type veth peer name eth0 netns {self._init}")
        self._switch.ip(f"link set {self._port} master bridge up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "add", "default", "via", f"{_NETWORK}.1")

    def _keep_repository(self) -> str:
        """A host's /tmp hides the machine's: of a repository below it this shows the folder there, too."""
        if not ROOT.is_relative_to("/tmp"):
            return ""
        at = self.folder / ROOT.relative_to("/")
        return f"mkdir -p {at}; mount --bind {ROOT} {at}"

    def kill(self) -> None:
        """SIGKILL to all processes. Their peers see closed connections; `cut` before, and they see nothing."""
        for each in self._entered:  # one whose process was stopped has stopped too, and would not take leave of it
            each.send_signal(signal.SIGCONT)
        _end_init(self._unshare, self._init)
        # Or the kernel would for minutes try to close the connections of a host that is gone.
        self._switch.ip(f"link delete {self._port}", check=False)

    def is_up(self) -> bool:
        return self._unshare.poll() is None

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """A process of this host, in its /tmp. What this gives is its parent outside: see `process_of`."""
        entered = ["nsenter", f"--target={self._init}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        options = {"text": True, "stdin": subprocess.DEVNULL, **options}
        self._entered.append(
            subprocess.Popen([*entered, "env", "-C", "/tmp", *command], env=self._environment, **options)
        )
        return self._entered[-1]

    def run(self, *command: str, timeout: float = patient(60)) -> str:
        """Run a command on this host; gives its standard output. Fails with its errors."""
        process = self.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process_of(process).kill()
            raise
        assert process.returncode == 0, f"{self.name}: {' '.join(command)}: {out}{errors}"
        return out

    def processes(self, having: str = "") -> list[psutil.Process]:
        """Processes of this host whose command lines have this text, oldest first; without its init."""
        if not self.is_up():
            return []
        space = os.readlink(f"/proc/{self._init}/ns/pid")
        found = [each for each in psutil.process_iter(["cmdline"]) if each.pid != self._init and _space(each) == space]
        return [each for each in found if having in " ".join(each.info["cmdline"] or [])]

    def cut(self) -> None:
        """From now on packets from and to this host vanish: no connection is closed, no link is seen to be down."""
        self._switch.ip(f"link set dev {self._port} state disabled", "bridge")

    def restore(self) -> None:
        """End a cut."""
        # Of a host that was just powered on the link takes a moment to be up, and before has no state.
        command = f"link set dev {self._port} state forwarding", "bridge"
        wait_for(lambda: self._switch.ip(*command, check=False), f"the link of {self.name}")

    def shape(self, mbit: float | None) -> None:
        """Bound the rate of this host's link, in each direction; None: no bound."""
        shape = f"root tbf rate {mbit}mbit burst 64kb latency 200ms"
        for do in (self._switch.ip, lambda arguments, program: self.run(program, *arguments.split())):
            device = self._port if do == self._switch.ip else "eth0"
            do(f"qdisc replace dev {device} {shape}" if mbit else f"qdisc delete dev {device} root", "tc")


def require_namespaces() -> None:
    """Skip the test where this user cannot make hosts."""
    for program in ("unshare", "nsenter", "ip", "tc", "bridge"):
        if shutil.which(program) is None:
            pytest.skip(f"no hosts can be made here: {program} is not installed (util-linux, iproute2)")
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "bridge", "type", "bridge"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode:
        pytest.skip(f"no hosts can be made here: {tried.stderr.strip()}")


def process_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that `Host.popen` started, to send signals to."""
    children: list[psutil.Process] = []
    wait_for(lambda: children.extend(psutil.Process(process.pid).children()) or children, "a process on a host")
    return children[0]


def wait_for(condition: Callable[[], object], what: str, timeout: float = patient(60)) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.1)


def run(*command: str, check: bool = True) -> bool:
    """Whether it succeeded, which it must with `check`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not (check and done.returncode), f"{' '.join(command)}: {done.stderr.strip()}"
    return done.returncode == 0


def _start_init(command: list[str]) -> tuple[subprocess.Popen[str], int]:
    """Start a namespace's first process; gives its parent, which ends with it, and its number as seen from here."""
    unshare = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert unshare.stdout
    assert unshare.stderr
    if not unshare.stdout.readline():
        raise AssertionError(unshare.stderr.read())
    return unshare, psutil.Process(unshare.pid).children()[0].pid


def _end_init(unshare: subprocess.Popen[str], init: int) -> None:
    if unshare.poll() is None:
        os.kill(init, signal.SIGKILL)
        unshare.communicate()


def _enter_network(process: int) -> None:
    """Move the calling thread into the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{process}/ns/net") as space:
        if libc.setns(space.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _space(process: psutil.Process) -> str:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:
        return ""
