"""Progress: bars on a terminal, plain lines at intervals elsewhere."""

import io

import pytest
from rich.console import Console

from rbm_dist.report import progress
from rbm_dist.report.progress import ProgressBars


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the bars look at."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=150, color_system=None)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_lines_where_there_is_no_terminal(clock: Clock) -> None:
    out = console(terminal=False)
    with ProgressBars(out) as bars:
        for done in range(0, 100, 5):
            bars.update("teacher", done, 100, "epochs", "loss 0.5")
            clock.now += 4
        bars.update("teacher", 100, 100, "epochs")
    # One line in ten seconds at most (every third update is later than that), with 5 epochs in 4 s.
    assert shown(out).splitlines() == [
        "  teacher: 0/100 epochs loss 0.5",
        *(f"  teacher: {done}/100 epochs, {(100 - done) * 0.8:.0f} s left loss 0.5" for done in range(15, 100, 15)),
    ]


def test_rates_begin_where_a_loop_went_on(clock: Clock) -> None:
    out = console(terminal=False)
    with ProgressBars(out) as bars:
        bars.update("student", 900, 1000, "epochs")
        clock.now += 50
        bars.update("student", 950, 1000, "epochs")
    assert shown(out).splitlines()[1] == "  student: 950/1,000 epochs, 50 s left"


def test_bars_on_a_terminal(clock: Clock) -> None:
    out = console(terminal=True)
    with ProgressBars(out) as bars:
        bars.update("teacher", 0, 2000, "epochs")
        clock.now += 10
        bars.update("teacher", 1500, 2000, "epochs", "loss 0.5")
        bars._bars.refresh()
        assert "1,500/2,000 epochs" in shown(out)
        assert "150.0 epochs/s" in shown(out)
        assert "loss 0.5" in shown(out)
        bars.finish("teacher")
        assert not bars._bars.tasks
        bars.finish("teacher")
        bars.update("teacher", 1, 3, "epochs")
        assert len(bars._bars.tasks) == 1


def test_text_is_printed_beside_the_bars() -> None:
    out = console(terminal=False)
    with ProgressBars(out) as bars:
        bars.print("[bold]done[/]")
    assert shown(out) == "done\n"


def test_a_loop_at_work_has_a_line_every_half_minute(clock: Clock) -> None:
    out = console(terminal=False)
    with ProgressBars(out) as bars:
        bars.update("teacher", 0, 1000, "steps", "epoch 0")
        for _ in range(70):
            clock.now += 1
            bars.update("mlp", 10, 10, "epochs")  # is done, and needs no line
            bars.tick()
        bars.update("teacher", 100, 1000, "steps", "epoch 1")
    assert shown(out).splitlines() == [
        "  teacher: 0/1,000 steps epoch 0",
        "  teacher: 0/1,000 steps epoch 0 (no word for 31 s)",
        "  teacher: 0/1,000 steps epoch 0 (no word for 62 s)",
    ]


def test_a_group_that_goes_on_from_its_checkpoint_is_timed_anew(clock: Clock) -> None:
    out = console(terminal=False)
    with ProgressBars(out) as bars:
        for done in (0, 500, 400, 450):
            bars.update("teacher", done, 1000, "steps")
            clock.now += 10
        assert bars.loops["teacher"].rate == 5.0
        assert bars.loops["teacher"].left_s == 110.0
