"""A long run on hosts that differ, under random mishaps: does it always go on, how soon, and is the result the same?

    python -m tests.soak [--events 40] [--seed 0] [--json benchmarks/results/soak.json]

Needs what tests/cluster needs: root, and iproute2. An event that ends the driver is answered by the same submission.
"""

import json
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.cluster.bed import Bed
from tests.cluster.hosts import SCRATCH, Host
from tests.cluster.submitted import DRIVER, MAILBOX, MEMORY, SERVER, WORKER, Submitted, Undisturbed

_PROGRESS_S = 600.0  # without a new checkpoint or a finished stage: the soak has failed
_STAGES = ("source", "partition", "teacher", "soft_labels", "student", "evaluate")
_NOTHING = "nothing to hit"  # in this stage
Event = Callable[["Soak"], str]


class Soak:
    """The bed, the run of the moment, and the dice."""

    def __init__(self, folder: Path, seed: int, overrides: list[str]):
        self.random, self._overrides = random.Random(seed), overrides
        self.bed = Bed(folder, ["head", "a", "b"])
        self.bed.mend()
        self.exit_codes: list[int] = []
        self.run = Submitted(self.bed, *overrides)

    def any_host(self) -> Host:
        """One that is not the head."""
        return self.bed.hosts[self.random.choice("ab")]

    def signal_process(self, name: str, number: signal.Signals) -> str:
        found = [(host, each) for host in self.bed.hosts.values() for each in host.processes(name)]
        if not found:
            return _NOTHING
        host, process = self.random.choice(found)
        process.send_signal(number)
        return f"{number.name} to {name.removeprefix('ray::')} on {host.name}"

    def marks(self) -> set[str]:
        """What shows progress: finished stages and checkpoints."""
        keys = self.bed.keys(f"{self.run.run}/")
        return {key for key in keys if key.endswith(("manifest.json", "checkpoint.json", "results.json"))}

    def wait_for_progress(self) -> float:
        """Seconds until there is progress; submits again what has ended."""
        start, before = time.monotonic(), self.marks()
        while not self.marks() - before:
            if time.monotonic() - start > _PROGRESS_S:
                raise SystemExit(f"no progress for {_PROGRESS_S:g} s:\n{self.run.log[-5000:]}")
            if self.run.process.poll() is not None:
                if self.is_done():
                    break
                self.submit_again()
            time.sleep(0.2)
        return time.monotonic() - start

    def submit_again(self) -> None:
        self.exit_codes.append(self.run.process.returncode)
        self.bed.mend()
        self.run = Submitted(self.bed, *self._overrides, run=self.run.run)

    def is_done(self) -> bool:
        return self.run.process.poll() == 0

    def stage(self) -> str:
        done = {key.split("/")[1] for key in self.marks() if key.endswith("manifest.json")}
        folders = {"partition": "graph"}
        return next((stage for stage in _STAGES if folders.get(stage, stage) not in done), "end")


def _kill(name: str) -> Event:
    return lambda soak: soak.signal_process(name, signal.SIGKILL)


def _hang(soak: Soak) -> str:
    return soak.signal_process(WORKER, signal.SIGSTOP)


def _host_dies(soak: Soak) -> str:
    host, silent = soak.any_host(), soak.random.random() < 0.5
    if silent:
        host.cut()
    host.kill()
    time.sleep(soak.random.uniform(0, 30))
    soak.bed.mend()
    return f"{host.name} {'lost its power' if silent else 'was killed'}, and came back"


def _cluster_dies(soak: Soak) -> str:
    soak.bed.head.kill()
    soak.run.stop()
    return "the head was killed, and with it the cluster"


def _link_is_cut(soak: Soak) -> str:
    host, seconds = soak.any_host(), soak.random.uniform(1, 20)
    host.cut()
    time.sleep(seconds)
    host.restore()
    return f"the link of {host.name} was cut for {seconds:.0f} s"


def _link_is_slow(soak: Soak) -> str:
    host = soak.random.choice(list(soak.bed.hosts.values()))
    host.shape(20)
    time.sleep(20)
    host.shape(None)
    return f"the link of {host.name} had 20 Mbit/s for 20 s"


def _storage_halts(soak: Soak) -> str:
    (server,) = soak.bed.store.processes("moto.server")
    server.send_signal(signal.SIGSTOP)
    time.sleep(10)
    server.send_signal(signal.SIGCONT)
    return "the object storage halted for 10 s"


def _disk_is_full(soak: Soak) -> str:
    host = soak.any_host()
    host.run("sh", "-c", f"cat /dev/zero > {SCRATCH}/full 2> /dev/null || true")
    time.sleep(10)
    host.run("rm", f"{SCRATCH}/full")
    return f"the disk of {host.name} was full for 10 s"


def _driver_ends(number: signal.Signals) -> Event:
    def end(soak: Soak) -> str:
        if not soak.bed.head.processes(DRIVER):
            return _NOTHING
        soak.run.driver().send_signal(number)
        soak.run.end()
        return f"{number.name} to the driver, which ended with {soak.run.process.returncode}"

    return end


EVENTS: list[Event] = [
    *map(_kill, (WORKER, SERVER, MEMORY, MAILBOX)), _hang, _host_dies, _cluster_dies, _link_is_cut, _link_is_slow,
    _storage_halts, _disk_is_full, _driver_ends(signal.SIGTERM), _driver_ends(signal.SIGKILL),
]  # fmt: skip


def main(
    events: Annotated[int, typer.Option(help="At least so many.")] = 40,
    seed: int = 0,
    teacher_epochs: Annotated[int, typer.Option(help="Of the run, which must last as long as the events.")] = 400,
    student_epochs: int = 600,
    every_s: Annotated[float, typer.Option(help="Seconds between progress and the next event, on average.")] = 15.0,
    json_: Annotated[Path, typer.Option("--json", help="Where the events go.")] = Path("benchmarks/results/soak.json"),
) -> None:
    """Run until the end, and compare."""
    overrides = [f"teacher.epochs={teacher_epochs}", f"student.epochs={student_epochs}", "cluster.max_failures=1000"]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    undisturbed = Undisturbed(folder / "undisturbed", *overrides)
    soak = Soak(folder, seed, overrides)
    start, rows = time.monotonic(), []
    try:
        soak.wait_for_progress()
        bag: list[Event] = []
        while not soak.is_done():
            if not bag:  # every kind as often as any other
                bag = soak.random.sample(EVENTS, len(EVENTS))
            row: dict[str, Any] = {"at_s": round(time.monotonic() - start, 1), "stage": soak.stage()}
            codes = len(soak.exit_codes)
            row["event"] = bag.pop()(soak)
            if row["event"] == _NOTHING:
                continue
            row["progress_after_s"] = round(soak.wait_for_progress(), 1)
            row["submitted_again"] = len(soak.exit_codes) - codes
            rows.append(row)
            print(json.dumps(row), flush=True)
            time.sleep(soak.random.uniform(0, 2 * every_s))
            if soak.run.process.poll() not in (None, 0):
                soak.submit_again()
        same = _holds(undisturbed.assert_same_accuracies, soak.run)
        # In float32, one process and three ranks that nothing disturbs are as far apart after so many epochs.
        same_weights = _holds(undisturbed.assert_same_weights, soak.run)
    finally:
        soak.run.stop()
        soak.bed.close()
    report = {
        "seed": seed, "seconds": round(time.monotonic() - start, 1), "same_accuracies": same,
        "same_weights": same_weights,
        "exit_codes_before_the_last": soak.exit_codes, "events": rows,
    }  # fmt: skip
    json_.write_text(json.dumps(report, indent=1) + "\n")
    slowest = max((row["progress_after_s"] for row in rows), default=0)
    print(f"{len(rows)} events, progress after {slowest:g} s at most; accuracies the same: {same}; {json_}")
    raise typer.Exit(0 if same and len(rows) >= events else 1)


def _holds(check: Callable[[Submitted], None], run: Submitted) -> bool:
    try:
        check(run)
    except AssertionError as error:
        print(error)
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
