"""Progress, metrics and warnings on a real Ray cluster, also when the mailbox between is lost or late."""

import io
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

from rbm_dist.config.run import ClusterConfig
from rbm_dist.moe.routing import MemoryStatistics
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.report.metrics import MetricsWriter
from rbm_dist.report.progress import ProgressBars
from rbm_dist.report.status import RunStatus
from rbm_dist.runtime.mailbox import Reporter, start_mailbox
from rbm_dist.runtime.memory_store import ActorMemoryStore
from rbm_dist.runtime.progress import ProgressRelay
from rbm_dist.runtime.tasks import run_on_parts, run_tasks
from rbm_dist.runtime.training import TrainingGroups
from tests.patience import patient

_log = logging.getLogger("rbm_dist.somewhere")


class Terminal:
    """What an operator sees, and the metrics of a run directory."""

    def __init__(self, mailbox: Any, folder: Path):
        self.mailbox, self.out, self.folder = mailbox, io.StringIO(), folder
        self.writer = MetricsWriter(str(folder))
        self.bars = ProgressBars(Console(file=self.out, width=200))

    def relay(self) -> ProgressRelay:
        return ProgressRelay(self.mailbox, self.bars, self.writer)

    def warnings(self) -> list[str]:
        return self.said("!")

    def said(self, mark: str) -> list[str]:
        return [line.removeprefix(f"  {mark} ") for line in self.out.getvalue().splitlines() if line[2:3] == mark]

    def epochs(self, loop: str) -> list[int]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row["epoch"] for row in map(json.loads, lines) if row["loop"] == loop]


@pytest.fixture(scope="module")
def mailbox(cluster: None) -> Any:
    return start_mailbox()


@pytest.fixture
def terminal(mailbox: Any, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(mailbox, tmp_path)
    with terminal.bars:
        yield terminal
    terminal.writer.close()


def row(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "time": 1000.0 + epoch, "loss": 0.5}


def kill_the_mailbox() -> None:
    pid = ray.get(ray.get_actor("progress").__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def train(reporter: Reporter, lose_after: int | None) -> str:
    """Ten epochs of a loop; after one of them the mailbox is lost, with what is in it."""
    reporter.begin("teacher", [])
    history = []
    for epoch in range(10):
        history.append(row(epoch))
        reporter.metrics("teacher", history[-1])
        reporter.progress("teacher", epoch + 1, 10, "epochs")
        if epoch == lose_after:
            kill_the_mailbox()
    reporter.end("teacher", history)
    return "done"


def test_metrics_arrive_in_order(terminal: Terminal) -> None:
    with terminal.relay() as relay:
        run_tasks("teacher", train, [(relay.reporter, None)], cluster=ClusterConfig())
    assert terminal.epochs("teacher") == list(range(10))
    with terminal.relay() as relay:  # of the next stage
        relay.reporter.begin("mlp", [row(0)])
        relay.reporter.metrics("mlp", row(1))
    assert terminal.epochs("mlp") == [0, 1]
    assert terminal.epochs("teacher") == list(range(10)), "nothing arrives twice"


def test_a_lost_mailbox_costs_neither_the_stage_nor_metrics(terminal: Terminal) -> None:
    with terminal.relay() as relay:
        assert run_tasks("teacher", train, [(relay.reporter, 4)], cluster=ClusterConfig()) == ["done"]
    assert terminal.epochs("teacher") == list(range(10))


def test_the_driver_goes_on_polling_after_a_loss(terminal: Terminal) -> None:
    with terminal.relay() as relay:
        relay.reporter.begin("teacher", [])
        ray.get(terminal.mailbox.put.remote({"kind": "metrics", "loop": "teacher", "row": row(0)}))
        kill_the_mailbox()
        relay.reporter.metrics("teacher", row(1))
        deadline = time.monotonic() + patient(60)
        while not (terminal.folder / "metrics.jsonl").exists() or 1 not in terminal.epochs("teacher"):
            assert time.monotonic() < deadline, "later metrics come while the stage is still at work"
            time.sleep(0.05)


def test_a_late_answer_loses_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbm_dist.runtime.progress._ANSWER_S", 0.1)
    with terminal.relay() as relay:
        relay.reporter.begin("teacher", [])
        terminal.mailbox.__ray_call__.remote(lambda _: time.sleep(2))
        for epoch in range(3):
            relay.reporter.metrics("teacher", row(epoch))
        time.sleep(3)
    assert terminal.epochs("teacher") == [0, 1, 2]


def test_metrics_that_cannot_be_written_are_said_once(terminal: Terminal, caplog: pytest.LogCaptureFixture) -> None:
    (terminal.folder / "metrics.jsonl").mkdir()
    with terminal.relay() as relay:
        relay.reporter.metrics("teacher", row(0))
        relay.reporter.metrics("teacher", row(1))
        relay.reporter.end("teacher", [row(0), row(1)])
    (message,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert message.startswith(f"{terminal.folder}: metrics cannot be written, and may lack epochs: ")


def test_a_bar_that_cannot_be_drawn_is_none(terminal: Terminal) -> None:
    with terminal.relay() as relay:
        relay.reporter.progress("teacher", 1, 0, None)  # type: ignore[arg-type]
        terminal.mailbox.put.remote({"kind": "nonsense", "loop": "teacher"})
        relay.reporter.metrics("teacher", row(0))
    assert terminal.epochs("teacher") == [0]


def test_heartbeats_show_steps_with_what_the_last_epoch_gave(terminal: Terminal) -> None:
    with (
        RunStatus(str(terminal.folder), {"teacher": None}, {}) as status,
        ProgressRelay(terminal.mailbox, terminal.bars, terminal.writer, status) as relay,
    ):
        relay.reporter.begin("teacher", [])
        relay.reporter.heartbeat("teacher", 0, 5, 20, {"rows_per_s": 1234.0})
        relay.reporter.metrics("teacher", row(0))
        relay.reporter.progress("teacher", 1, 2, "epochs", "val loss 0.5")
        relay.reporter.heartbeat("teacher", 1, 12, 20, {"rows_per_s": 1250.0, "wait_share": 0.25})
        relay.reporter.saved("teacher", 10)
        deadline = time.monotonic() + patient(60)
        while not status.snapshot()["checkpoint"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        loop = status.snapshot()["loops"]["teacher"]
        assert (loop["done"], loop["total"], loop["unit"], loop["epoch"]) == (12, 20, "steps", 1)
        assert loop["note"] == "epoch 1, 1,250 rows/s val loss 0.5"
        assert loop["figures"] == {"rows_per_s": 1250.0, "wait_share": 0.25}
        assert loop["last_epoch"] == row(0)
        assert status.snapshot()["checkpoint"]["step"] == 10
        relay.reporter.end("teacher", [row(0)])
        while terminal.bars.loops:
            assert time.monotonic() < deadline, "a loop that ended early is not waited for"
            time.sleep(0.05)
    assert "  teacher: 5/20 steps epoch 0, 1,234 rows/s\n" in terminal.out.getvalue()
    assert json.loads((terminal.folder / "status.json").read_text())["loops"] == {}


def warn(number: int) -> None:
    logging.getLogger("another").info("not for the operator")
    if number == 0:
        _log.info("laid out so")
    _log.warning("checkpoint passed over: [part %d]", number % 2)
    if number == 3:
        try:
            raise ValueError("a cause")
        except ValueError:
            _log.exception("it went on")


def test_warnings_of_tasks_and_part_actors_are_shown_once(terminal: Terminal) -> None:
    with terminal.relay():
        run_tasks("partition", warn, ((number,) for number in range(6)), cluster=ClusterConfig())
    shown = terminal.warnings()
    texts = [each.partition(": ")[2] for each in shown]
    assert sorted(texts[:3]) == [
        "checkpoint passed over: [part 0]", "checkpoint passed over: [part 1]", "it went on: ValueError('a cause')"
    ]  # fmt: skip
    assert "partition, task 3: it went on: ValueError('a cause')" in shown
    assert terminal.said("·") == ["partition, task 0: laid out so"], "no warning, but worth a line"
    assert shown[3] == "4 more warning(s) like: checkpoint passed over: [part 0]"
    with terminal.relay():
        run_on_parts("soft_labels", lambda: warn, [7], ClusterConfig(inference_workers=1))
    assert terminal.warnings()[4:] == ["soft_labels, part 7: checkpoint passed over: [part 1]"], "of this stage"


def flood() -> None:
    for step in range(1000):
        _log.warning("step %d is odd", step)


def test_a_flood_is_counted(terminal: Terminal) -> None:
    with terminal.relay():
        run_tasks("student", flood, [()], cluster=ClusterConfig())
    shown = terminal.warnings()
    assert shown[:20] == [f"student, task 0: step {step} is odd" for step in range(20)]
    assert shown[20:] == ["980 more warning(s) like: step 0 is odd"]


def test_an_expert_that_starts_anew_is_named(terminal: Terminal) -> None:
    with terminal.relay():
        store = ActorMemoryStore(Mesh.single(), patient(60), decay=0.9, self_similarity=0.0, lr=0.01, reseed_after=2)
        store.init([torch.eye(3)], None)
        for version in range(2):
            store.push(version, [MemoryStatistics(torch.ones(3, 3), torch.tensor([0.0, 5.0, 1.0]))])
            store.pull(version + 1)
    assert terminal.warnings() == [
        "memory actor: routing memory: layer 0: expert 0 had no row for 2 steps; its memory starts anew beside expert 1"
    ]


def loop(mesh: Mesh, reporter: Reporter) -> None:
    _log.warning("all ranks say so")
    if mesh.rank == 0:
        train(reporter, 4)
    mesh.barrier()
    if mesh.rank == 1:
        _log.warning("rank 1 alone says so")


def test_a_training_group(terminal: Terminal) -> None:
    """Its warnings name the rank, and the loss of the mailbox in the middle does it no harm."""
    with terminal.relay() as relay:
        workers = ClusterConfig(
            train_workers=2, expert_parallel=2, collective_timeout_s=patient(300), start_timeout_s=patient(300)
        )
        with TrainingGroups(workers, relay.reporter, keep=False) as groups:
            groups.run("teacher", loop, {}, str(terminal.folder))
    assert terminal.epochs("teacher") == list(range(10))
    assert "teacher, rank 1: rank 1 alone says so" in terminal.warnings()
