"""The Slurm script with stand-ins for srun, ray and rbm-dist: what it starts, what it waits for, how it ends."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.patience import patient

ROOT = Path(__file__).parents[2]

# srun runs one process per task here; ray listens, as its head does, and rbm-dist says what it was given.
SRUN = """
while [[ $1 != ray ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
for ((i = 0; i < tasks; i++)); do "$@" & done
trap 'kill $(jobs -p)' TERM
wait
"""
RAY = f"""
echo "$*" >>started
[[ $* == *--head* ]] || exec sleep {patient(100)}
for option; do [[ $option == --port=* ]] && port=${{option#*=}}; done
exec {sys.executable} -c "import socket, time; s = socket.create_server(('', $port)); time.sleep({patient(100)})"
"""


def start(folder: Path, *, ray: str = RAY, rbm_dist: str, nodes: int = 3) -> subprocess.Popen[str]:
    for name, body in {"srun": SRUN, "ray": ray, "rbm-dist": rbm_dist}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_CPUS_ON_NODE": "2",
        "SLURMD_NODENAME": "n1",
    }
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "a.yaml", "seed=1", "run_dir=a b"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(folder: Path, *, ray: str = RAY, rbm_dist: str, nodes: int = 3) -> subprocess.CompletedProcess[str]:
    script = start(folder, ray=ray, rbm_dist=rbm_dist, nodes=nodes)
    out, errors = script.communicate(timeout=patient(60))
    return subprocess.CompletedProcess(script.args, script.returncode, out, errors)


@pytest.mark.timeout(patient(90))
@pytest.mark.parametrize("code", [0, 2, 137])
def test_the_exit_code_is_that_of_the_run(tmp_path: Path, code: int) -> None:
    wait_for_all = "until (($(wc -l <started) == 3)); do sleep 0.1; done"
    show = 'printf "%s|" "$@"; echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"'
    done = run(tmp_path, rbm_dist=f"{wait_for_all}; {show}; exit {code}")
    assert done.returncode == code, done.stderr
    arguments = done.stdout.split("|")
    assert arguments[:5] == ["run", "a.yaml", "seed=1", "run_dir=a b", "--address"]
    assert arguments[6] == "token 64\n"
    started = (tmp_path / "started").read_text().splitlines()
    assert len([line for line in started if "--head" in line]) == 1
    assert len([line for line in started if f"--address={arguments[5]}" in line]) == 2


@pytest.mark.timeout(patient(90))
def test_without_ray_nothing_is_run(tmp_path: Path) -> None:
    done = run(tmp_path, ray="exit 1", rbm_dist="touch ran")
    assert done.returncode == 1
    assert "error: Ray ended on a node; see rbm-dist-" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.timeout(patient(90))
def test_a_run_does_not_wait_for_a_ray_node_that_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    ray = RAY.replace(f"exec sleep {patient(100)}", "exec sleep 2")
    done = run(tmp_path, ray=ray, rbm_dist=f"exec sleep {patient(50)}", nodes=2)
    assert done.returncode == 1
    assert "error: Ray ended on a node" in done.stderr
    assert time.monotonic() - began < patient(40)


@pytest.mark.timeout(patient(90))
def test_before_the_time_limit_the_run_is_told_and_has_time(tmp_path: Path) -> None:
    saves = 'trap "sleep 1; echo saved; exit 143" TERM; touch running; while :; do sleep 0.1; done'
    script = start(tmp_path, rbm_dist=saves, nodes=1)
    deadline = time.monotonic() + patient(60)
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    script.terminate()
    out, errors = script.communicate(timeout=patient(60))
    assert (script.returncode, out, errors) == (143, "saved\n", "")


@pytest.mark.timeout(patient(90))
def test_what_was_told_before_the_run_began_ends_at_once(tmp_path: Path) -> None:
    script = start(tmp_path, ray="touch started; exec sleep 100", rbm_dist="touch ran")
    deadline = time.monotonic() + patient(60)
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    script.terminate()
    script.communicate(timeout=patient(60))
    assert script.returncode == 143
    assert not (tmp_path / "ran").exists()


def test_slurm_tells_the_script_alone_and_in_time() -> None:
    """With less time than a stopped job has elsewhere, the run would be killed as it saves."""
    text = (ROOT / "launch" / "slurm.sh").read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    environment = yaml.safe_load((ROOT / "launch" / "runtime_env.yaml").read_text())["env_vars"]
    assert int(seconds) >= int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
