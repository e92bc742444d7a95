"""When ranks ask, whatever their steps take, and that all of them hear the same."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.pace import Order, Pace
from tests.gloo import run_ranks


class Driver:
    """Gives the orders that it is made with, one after the other, and keeps what it is told."""

    def __init__(self, orders: list[Order]) -> None:
        self.orders = orders
        self.beats: list[tuple[Any, ...]] = []

    def order(self) -> Order:
        return self.orders.pop(0) if self.orders else "go"

    def heartbeat(self, *beat: Any) -> None:
        self.beats.append(beat)

    def saved(self, loop: str, step: int) -> None: ...


def hear(rank: int, world: int, orders: list[Order]) -> list[tuple[int, Order, bool]]:
    """At which steps a rank asked and what it heard. Ranks are not equally fast, and one fails at last."""
    mesh = Mesh.init(1, torch.device("cpu"))
    driver = Driver(orders if rank == 0 else ["leave"] * 99)  # only what rank 0 hears counts
    pace, heard = Pace("loop", driver, mesh, None), []
    for step in range(1, 120):
        time.sleep(0.0005 * ((step * (rank + 2)) % 5))
        pace.after_step(
            10, wait_s=0.5, edges=3.0, load_E=torch.tensor([1.0, 0.0]) if rank else torch.tensor([2.0, 1.0])
        )
        if pace.due:
            heard.append((step, *pace.ask(0, step, 119, False, failed=rank == 1 and step > 60)))
    if rank == 0:
        for loop, epoch, step, steps, figures in driver.beats:
            assert (loop, epoch, steps) == ("loop", 0, 119)
            assert step in {at for at, _, _ in heard}
            assert figures["expert_load"] == pytest.approx(2 * (world + 1) / (world + 2))
            assert figures["edges_per_s"] == pytest.approx(figures["rows_per_s"] * 3 * world / 10)
            assert figures["wait_share"] == pytest.approx(figures["rows_per_s"] * 0.5 / 10)
    return heard


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_ask_at_the_same_steps_and_hear_what_rank_0_was_told(world: int) -> None:
    orders: list[Order] = ["go", "save", "go", "leave"]
    heard = run_ranks(hear, world, world, orders)
    assert heard == [heard[0]] * world
    assert [order for _, order, _ in heard[0]][:4] == orders
    assert all(failed == (step > 60) for step, _, failed in heard[0])


@given(st.lists(st.floats(-3, 1.8), min_size=1, max_size=4), st.floats(0.1, 30))
def test_they_ask_about_once_a_second_whatever_steps_take(log_step_s: list[float], minutes: float) -> None:
    """Steps of 1 ms to 60 s, with a new duration now and then: one wait may be longer, but not the next."""
    now, saved = 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rbm_dist.parallel.pace.time.monotonic", lambda: now)
        pace, asked = Pace("loop", Driver([]), Mesh.single(), minutes), 0.0
        for step_s in (10**each for each in log_step_s):
            waits = []
            while len(waits) < 14:
                now += step_s
                pace.after_step(1)
                if pace.due:
                    order, _ = pace.ask(0, 1, 1, False, False)
                    assert (order == "save") == (now - saved >= 60 * minutes)
                    if order == "save":
                        pace.saving()
                        saved = now
                    waits.append(now - asked)
                    asked = now
            assert waits[-1] == pytest.approx(max(1.0, step_s), rel=0.6), "in the end"
            assert all(wait <= 1.6 * max(1.0, step_s) for wait in waits[2:])


def test_none_is_due_by_time_while_one_is_being_written() -> None:
    pace = Pace("loop", Driver([]), Mesh.single(), 1e-9)
    for writing in (True, True, False):
        while not pace.due:
            pace.after_step(1)
        assert pace.ask(0, 1, 1, writing, False) == ("go" if writing else "save", False)
