"""The doctor on this machine, and on two Ray nodes of which one then stands still."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from rbm_dist import cli
from rbm_dist.errors import InputError
from rbm_dist.runtime import doctor, host_facts
from rbm_dist.runtime.host_facts import Receiver, send


def test_this_machine(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["doctor", "--run-dir", str(run_dir)])
    assert result.exit_code == 0, result.output
    for part in (torch.__version__, ray.__version__, host_facts.code_hash(), "writes", socket.gethostname()):
        assert part in result.output
    assert not run_dir.exists() or list(run_dir.iterdir()) == [], "nothing is left"


def test_storage_that_can_be_held(s3_url: str, memory_url: str) -> None:
    assert [host_facts.storage_facts(url).get("held") for url in (s3_url, memory_url)] == [True, False]


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in host_facts.storage_facts(f"{tmp_path}/file/run")["error"]


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(InputError, match="cannot use this storage"):
        doctor.examine(None, "nowhere://bucket")
    with pytest.raises(InputError, match="no Ray cluster answers"):
        doctor.examine("127.0.0.1:1", None)


def test_a_hash_of_the_code_tells_checkouts_apart(tmp_path: Path) -> None:
    package = Path(host_facts.__file__).parents[1]
    subprocess.run(["cp", "-r", package, tmp_path], check=True)
    script = "from rbm_dist.runtime.host_facts import code_hash; print(code_hash())"

    def hash_there() -> str:
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        ).stdout.strip()  # fmt: skip

    assert hash_there() == host_facts.code_hash()
    with (tmp_path / "rbm_dist" / "errors.py").open("a") as module:
        module.write("\n# patched on one host\n")
    assert hash_there() != host_facts.code_hash()


def test_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two addresses of the loopback network stand for two hosts."""
    monkeypatch.setattr(host_facts, "_SEND_S", 0.2)
    receiver = Receiver("127.0.0.2")
    rate = send("127.0.0.2", receiver.port, "127.0.0.3")
    assert not isinstance(rate, str)
    assert rate > 1e6
    assert send("127.0.0.4", receiver.port, "127.0.0.3") == "Connection refused"
    monkeypatch.setattr(host_facts, "_ANSWER_S", 0.3)
    deaf = socket.create_server(("127.0.0.5", 0))
    said: list[float | str] = []
    thread = threading.Thread(target=lambda: said.append(send("127.0.0.5", deaf.getsockname()[1], "127.0.0.3")))
    thread.start()
    thread.join()
    assert said == ["timed out"]
    deaf.close()


@pytest.mark.slow
def test_every_node_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        hosts = doctor.examine(cluster.address, str(tmp_path))["hosts"]
        assert len(hosts) == 2
        for name, facts in hosts.items():
            (other,) = hosts.keys() - {name}
            assert facts["rates"][other] > 1e6
            assert abs(facts["clock_s"]) < 1
            assert facts["rbm-dist"].endswith(host_facts.code_hash())
            assert facts["storage"]["shared"]
            assert facts["resources"]["CPU"] == 1
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(doctor, "_ANSWER_S", 20.0)
        (stopped,) = (name for name in hosts if re.search(rf", {second.node_id[:6]}\)", name))
        raylet = second.all_processes["raylet"][0].process
        os.kill(raylet.pid, signal.SIGSTOP)
        hosts = doctor.examine(cluster.address, None)["hosts"]
        os.kill(raylet.pid, signal.SIGCONT)
        assert hosts[stopped] == {"silent": "no answer for 20 s"}
        (well,) = hosts.keys() - {stopped}
        assert hosts[well]["ray"] == ray.__version__
    finally:
        cluster.shutdown()
