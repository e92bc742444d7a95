"""The bed itself: hosts differ, links are cut as real ones are, and nothing is left of a bed whose owner was killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.cluster.bed import Bed
from tests.cluster.hosts import ROOT, process_of, require_namespaces, wait_for
from tests.patience import patient

ANSWER = "import socket, sys; s = socket.create_server(('', 7)); c, _ = s.accept(); print(c.recv(9)); print(c.recv(9))"
ASK = """if True:
    import socket, sys, time
    s = socket.create_connection((sys.argv[1], 7)); s.send(b'one'); print(flush=True); input(); s.send(b'two'); input()
"""
DOWNLOAD = """if True:
    import sys, time, urllib.request
    start = time.monotonic(); urllib.request.urlopen(sys.argv[1]).read(); print(time.monotonic() - start)
"""
OWNER = """if True:
    import sys; from pathlib import Path; from tests.cluster.bed import Bed
    bed = Bed(Path(sys.argv[1]), ["head"]); bed.head.popen("sleep", "1000")
    print([each.pid for host in bed.hosts.values() for each in host.processes()], flush=True); input()
"""


def test_hosts_differ(bed: Bed) -> None:
    for host in bed.hosts.values():
        host.run("sh", "-c", "hostname > /tmp/name; hostname > /dev/shm/name; echo $HOSTNAME > /mnt/scratch/name")
    for name, host in bed.hosts.items():
        assert host.run("cat", "/tmp/name", "/dev/shm/name").split() == [name, name]
        assert f"inet {host.address}/24" in host.run("ip", "address")
    bed.head.run("sh", "-c", "echo 1 > /mnt/shared/file")
    assert bed.hosts["a"].run("cat", "/mnt/shared/file") == "1\n"
    sleeping = bed.head.popen("sleep", "1000")
    assert process_of(sleeping) in bed.head.processes("sleep")
    assert not bed.hosts["a"].processes("sleep")
    process_of(sleeping).kill()
    assert sleeping.wait() == -signal.SIGKILL


def test_a_host_that_was_killed_starts_again_with_its_disk(bed: Bed) -> None:
    host = bed.hosts["a"]
    host.run("sh", "-c", "echo kept > /tmp/file; echo lost > /dev/shm/file")
    sleeping = host.popen("sleep", "1000")
    process_of(sleeping)
    host.kill()
    assert sleeping.wait(patient(5))
    host.start()
    assert host.run("sh", "-c", "ls /dev/shm; cat /tmp/file") == "kept\n"


def test_packets_of_a_cut_link_vanish_and_come_again(bed: Bed) -> None:
    """A connection that is open stays so, and what was said meanwhile arrives afterwards."""
    a, b = bed.hosts["a"], bed.hosts["b"]
    answering = a.popen("python", "-c", ANSWER, stdout=subprocess.PIPE)
    wait_for(lambda: ":7 " in a.run("ss", "-ltn"), "a listener")
    asking = b.popen("python", "-c", ASK, a.address, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert asking.stdout
    assert answering.stdout
    asking.stdout.readline()
    a.cut()
    print(file=asking.stdin, flush=True)
    time.sleep(2)
    assert asking.poll() is None
    assert answering.poll() is None
    a.restore()
    assert answering.stdout.read().split() == ["b'one'", "b'two'"]
    asking.communicate("\n")
    assert asking.returncode == 0


def test_a_shaped_link_is_slower(bed: Bed) -> None:
    a, b = bed.hosts["a"], bed.hosts["b"]
    b.run("sh", "-c", "head -c 1000000 /dev/zero > /tmp/file")
    serving = b.popen("python", "-m", "http.server", "80", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: ":80 " in b.run("ss", "-ltn"), "a listener")
    for host in (a, b):
        host.shape(4)
        assert float(a.run("python", "-c", DOWNLOAD, f"http://{b.address}/file")) > 1, "8 Mbit at 4 Mbit/s"
        host.shape(None)
        assert "tbf" not in host.run("tc", "qdisc", "show")
    process_of(serving).kill()
    serving.wait()


def test_nothing_is_left_of_a_bed_whose_owner_was_killed(tmp_path: Path) -> None:
    require_namespaces()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout
    processes = [psutil.Process(pid) for pid in json.loads(owner.stdout.readline())]
    assert len(processes) >= 2
    owner.kill()
    _, alive = psutil.wait_procs(processes, timeout=patient(10))
    assert not alive
