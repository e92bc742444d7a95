"""Batches made ahead: the same as without, in order; and no way of leaving keeps a thread or waits for ever."""

import functools
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.errors import InputError, RunError
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.sampler import Sample
from tests.patience import patient
from tests.small_graph import small_store


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert prefetch_threads() == []


def prefetch(jobs: list[Callable[[], int]], depth: int = 2, timeout_s: float = patient(10)) -> Prefetch[int]:
    return Prefetch("numbers", jobs, timeout_s, depth)


def numbers(count: int) -> list[Callable[[], int]]:
    return [functools.partial(int, i) for i in range(count)]


@given(st.integers(0, 12), st.integers(0, 5))
def test_results_come_in_the_order_of_the_jobs(count: int, depth: int) -> None:
    with prefetch(numbers(count), depth) as results:
        assert list(results) == list(range(count))


def test_samples_and_rows_are_those_without_a_thread(tmp_path: Path) -> None:
    store = small_store(str(tmp_path))

    def read(step: int) -> tuple[Sample, np.ndarray]:
        sample = store.sample(np.arange(step, 240, 11), (3, 2), step)
        return sample, store.gather("feat", sample.nodes)

    jobs = [functools.partial(read, step) for step in range(11)]
    expected = [job() for job in jobs]
    with Prefetch("batches", jobs, patient(10)) as batches:
        for (sample, feat), (sample_expected, feat_expected) in zip(batches, expected, strict=True):
            for name in ("nodes", "src", "dst"):
                np.testing.assert_array_equal(getattr(sample, name), getattr(sample_expected, name))
            np.testing.assert_array_equal(feat, feat_expected)


def test_one_other_thread_does_the_jobs_while_the_consumer_computes() -> None:
    """The second batch is made while the consumer has the first: it sees it finished without asking for it."""
    made = [threading.Event() for _ in range(3)]
    threads = set()

    def make(i: int) -> int:
        threads.add(threading.current_thread())
        made[i].set()
        return i

    with prefetch([functools.partial(make, i) for i in range(3)], depth=1) as results:
        assert next(results) == 0
        assert made[1].wait(patient(10))
        assert not made[2].is_set(), "only one ahead"
        assert list(results) == [1, 2]
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    threads.clear()
    with prefetch([functools.partial(make, i) for i in range(3)], depth=0) as results:
        assert list(results) == [0, 1, 2]
    assert threads == {threading.current_thread()}


class Batch:
    pass


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_slow_consumer_keeps_no_more_than_depth_and_its_own_alive(depth: int) -> None:
    alive: weakref.WeakSet[Batch] = weakref.WeakSet()

    def make() -> Batch:
        batch = Batch()
        alive.add(batch)
        return batch

    most = 0
    with Prefetch("batches", [make] * 12, 10, depth) as batches:
        for batch in batches:
            time.sleep(0.01)
            assert batch in alive
            most = max(most, len(alive))
    assert most == depth + 1
    del batch
    assert len(alive) == 0


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("error", [InputError("bad file"), SystemExit(3), TimeoutError("socket"), MemoryError()])
def test_an_exception_arrives_at_its_place_with_its_traceback(error: BaseException, depth: int) -> None:
    def fail() -> int:
        raise error

    jobs = numbers(9)
    jobs[4] = fail
    found = []
    with pytest.raises(type(error)) as raised, prefetch(jobs, depth) as results:
        found.extend(iter(results.__next__, None))
    assert raised.value is error
    assert found == [0, 1, 2, 3]
    assert raised.traceback[-1].name == "fail"
    assert prefetch_threads() == [], "while the exception, and the frames that it holds, are still there"


def test_an_end_of_iteration_in_a_job_is_no_end_of_the_batches() -> None:
    for depth in (0, 2):
        with pytest.raises(RuntimeError, match="StopIteration"), prefetch([lambda: next(iter([]))], depth) as results:
            list(results)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_leaving_early_ends_the_thread_after_the_job_at_hand(error: type[BaseException] | None) -> None:
    calls = []

    def make() -> int:
        calls.append(0)
        time.sleep(0.01)
        return 0

    def leave() -> None:
        with prefetch([make] * 1000, depth=50) as results:
            for _ in results:
                if error is None:
                    break
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    assert prefetch_threads() == []
    assert len(calls) < 40


def test_a_generator_that_is_not_used_up_ends_its_thread_when_it_is_closed() -> None:
    def through() -> Iterator[int]:
        with prefetch(numbers(100)) as results:
            yield from results

    generator = through()
    assert prefetch_threads() == [], "nothing happens before it is asked"
    assert next(generator) == 0
    assert prefetch_threads() == ["prefetch numbers"]
    generator.close()  # type: ignore[attr-defined]
    assert prefetch_threads() == []


def test_a_list_of_jobs_that_fails_ends_the_thread() -> None:
    def jobs(good: int) -> Iterator[Callable[[], int]]:
        yield from numbers(good)
        raise OSError("no more")

    for good in (0, 5):
        with pytest.raises(OSError, match="no more"), Prefetch("numbers", jobs(good), patient(10)) as results:
            list(results)


def test_a_job_that_hangs_is_an_error_that_names_it() -> None:
    release = threading.Event()
    start = time.perf_counter()
    with (
        pytest.raises(RunError, match=r"numbers: none came for 1 s; .* raise cluster.collective_timeout_s"),
        prefetch([*numbers(1), lambda: int(release.wait(patient(60)))], timeout_s=1) as results,
    ):
        list(results)
    assert time.perf_counter() - start < 1.9, "it waits once"
    with pytest.raises(RunError, match="numbers"), prefetch([*numbers(1), release.wait], timeout_s=0.2) as results:
        next(results)  # leaves although the thread cannot
    with pytest.raises(ValueError, match="the first"), prefetch([release.wait], timeout_s=0.2):
        raise ValueError("the first error is the one to see")
    assert len(prefetch_threads()) == 3
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join(patient(10))


def test_a_job_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import time; from rbm_dist.graph.loader import Prefetch\n"
        "with Prefetch('numbers', [lambda: time.sleep(100)], 0.1) as results: next(results)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 1
    assert "numbers: none came" in done.stderr


def test_the_wait_is_the_consumers() -> None:
    jobs = [functools.partial(time.sleep, 0.05)] * 4
    for depth in (0, 2):
        loader = Prefetch("naps", jobs, patient(10), depth)
        with loader as naps:
            list(naps)
        assert 0.19 < loader.take_wait_s() < patient(2)
        assert loader.take_wait_s() == 0
    slow = Prefetch("naps", jobs, patient(10))
    with slow as naps:
        for _ in naps:
            time.sleep(0.2)
    assert slow.take_wait_s() < 0.19, "only for the first"
