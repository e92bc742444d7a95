"""The command line without a cluster: exit codes, one message and no traceback, and what is printed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rbm_dist import __version__, cli
from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError, RunError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["rbm-dist", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """A configuration that is good."""
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\n")
    return path


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    stages = ["source", "partition", "teacher", "soft-labels", "encodings", "student", "evaluate"]
    for command in [
        "run",
        "plan",
        "predict",
        "inspect",
        "status",
        "doctor",
        "checkpoint",
        "experiment",
        "tune",
        "config",
        *stages,
    ]:
        assert f" {command} " in shown
        assert run(monkeypatch, command, "--help") == 0
        assert command in capsys.readouterr().out


def test_help_needs_neither_torch_nor_ray() -> None:
    script = (
        "import sys; sys.argv = ['rbm-dist', '--help']\n"
        "from rbm_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rbm_dist", "config", "no.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no.yaml: cannot read the configuration: No such file or directory\n"


def test_config_prints_every_key(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "config", str(config_path), "teacher.lr=1e-7") == 0
    printed = capsys.readouterr().out
    config = load(config_path, ["teacher.lr=1e-7"])
    assert yaml.safe_load(printed) == config.model_dump(mode="json")
    config_path.write_text(printed)
    assert load(config_path) == config


def test_config_prints_the_schema(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "config", "--schema") == 0
    assert json.loads(capsys.readouterr().out) == Config.model_json_schema()


@pytest.mark.parametrize(
    "command", ["config", "plan", "run", "source", "partition", "teacher", "soft-labels", "student"]
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CONFIG", "student.norm='[red]x[/]'"], "'batch' or 'none', found '[red]x[/]'"),
        (["CONFIG", "nonsense"], "command line: 'nonsense' is not of the form key=value"),
        (["missing.yaml"], "missing.yaml: cannot read the configuration"),
    ],
)
def test_a_bad_configuration_is_one_message_and_exit_code_2(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    assert run(monkeypatch, command, *(str(config_path) if word == "CONFIG" else word for word in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not (config_path.parent / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["config"], ["nonsense"], ["run"], ["predict", "somewhere"], ["run", "--nonsense"]]
)
def test_a_command_that_is_not_whole_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.err
    assert "Traceback" not in shown.err


def test_plan_says_whether_a_run_fits(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "source={kind: ogb, name: ogbn-papers100M, root: nowhere}"
    report = config_path.parent / "plan.json"
    assert run(monkeypatch, "plan", str(config_path), "--memory", "16", "--cores", "4", "--json", str(report)) == 0
    assert "it fits" in capsys.readouterr().out
    assert json.loads(report.read_text())["facts"]["num_nodes"] == 1797
    assert run(monkeypatch, "plan", str(config_path), source, "--hosts", "2", "--memory", "8") == 1
    shown = capsys.readouterr().out
    assert "published sizes of ogbn-papers100M" in shown
    assert "does not fit: partition: needs " in shown
    assert run(monkeypatch, "plan", str(config_path), "source={kind: npz, path: no.npz}") == 2
    assert capsys.readouterr().err == f"error: {Path.cwd()}/no.npz: no such file (source.path)\n"
    assert not (config_path.parent / "run").exists()


def test_a_plan_is_written_over_a_plan_only(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = config_path.parent / "plan.json"
    arguments = ["plan", str(config_path), "--json", str(report)]
    for mine in ('{"name": "mine"}', "[1]", "mine"):
        report.write_text(mine)
        assert run(monkeypatch, *arguments) == 2
        assert report.read_text() == mine
        assert f"{report}: would be written over and is not rbm-dist's; name another place (--json)" in (
            capsys.readouterr().err
        )
    report.unlink()
    assert [run(monkeypatch, *arguments) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("exists", [True, False])
def test_predict_on_a_folder_that_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    folder = tmp_path if exists else tmp_path / "nothing"
    assert run(monkeypatch, "predict", str(folder), "--out", str(tmp_path / "out.parquet")) == 2
    assert capsys.readouterr().err == f"error: {folder}: not a run directory (no student/config.json)\n"
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("a: [b] is wrong"), 2, "error: a: [b] is wrong\n"),
        (RunError("a worker was lost"), 1, "error: a worker was lost\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli.runs, "load", fail)
    assert run(monkeypatch, "config", "a.yaml") == code
    assert capsys.readouterr().err.startswith(message)


def test_who_is_terminated_while_ray_waits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except SystemExit:
            raise SystemExit(1) from None  # as Ray does

    monkeypatch.setattr(cli.runs, "load", wait)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(monkeypatch, "config", "a.yaml") == 143
    finally:
        signal.signal(signal.SIGTERM, before)
        cli._terminated.clear()
