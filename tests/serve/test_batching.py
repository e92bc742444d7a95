"""Joined rows get the answers that they get alone, and nothing waits while the engine is idle."""

import asyncio

import numpy as np
import pytest

import rbm_dist
from rbm_dist.errors import InputError
from rbm_dist.serve.batching import Batcher, rows_on_loop
from rbm_dist.serve.export import export
from rbm_dist.serve.loaded import LoadedStudent
from tests.serve.exported import exported


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> LoadedStudent:
    url = str(tmp_path_factory.mktemp("rbm"))
    export(url, *exported())
    return rbm_dist.load(url)


def drawn(rows: int) -> dict[str, np.ndarray]:
    return {"feat": np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)}


def ask_at_once(student: LoadedStudent, questions: list[dict[str, np.ndarray]], on_loop: int) -> tuple[list, list[int]]:
    """Answers (or what was raised), and the rows of each batch."""
    batches: list[int] = []

    async def ask() -> list:
        batcher = Batcher(student, batches.append, on_loop)
        asked = asyncio.gather(*map(batcher.probabilities, questions), return_exceptions=True)
        answers = await asked
        assert batcher.waiting == 0
        return answers

    return asyncio.run(ask()), batches


def test_what_arrives_while_the_engine_is_busy_is_computed_together(student: LoadedStudent) -> None:
    questions = [drawn(rows) for rows in (3, 1, 5, 2, 4)]
    answers, batches = ask_at_once(student, questions, on_loop=0)
    assert batches == [3, 1 + 5 + 2 + 4]  # the first does not wait for the others
    for question, answer in zip(questions, answers, strict=True):
        np.testing.assert_allclose(answer, student.probabilities(question), atol=1e-6)


def test_batches_are_bounded_and_one_request_is_never_split(student: LoadedStudent) -> None:
    questions = [drawn(rows) for rows in (1, 3000, 1000, 500, 5000, 1)]
    answers, batches = ask_at_once(student, questions, on_loop=0)
    assert batches == [1, 4000, 500, 5000, 1]
    for question, answer in zip(questions, answers, strict=True):
        np.testing.assert_allclose(answer, student.probabilities(question), atol=1e-6)


def test_a_row_at_fault_spoils_no_other_request(student: LoadedStudent) -> None:
    questions = [drawn(rows) for rows in (3, 2, 4, 2)]
    questions[2]["feat"][1, 2] = np.nan
    answers, _ = ask_at_once(student, questions, on_loop=0)
    assert isinstance(answers[2], InputError)
    assert "row 1, column x2" in str(answers[2])  # by its own numbers
    for place in (0, 1, 3):
        np.testing.assert_allclose(answers[place], student.probabilities(questions[place]), atol=1e-6)


def test_few_rows_are_computed_on_the_loop(student: LoadedStudent) -> None:
    questions = [drawn(rows) for rows in (3, 1, 5)]
    answers, batches = ask_at_once(student, questions, on_loop=8)
    assert batches == [3, 1, 5]
    for question, answer in zip(questions, answers, strict=True):
        np.testing.assert_array_equal(answer, student.probabilities(question))
    assert rows_on_loop(student) in (0, *(1 << power for power in range(11)))


def test_who_gives_up_keeps_no_one_waiting(student: LoadedStudent) -> None:
    async def ask() -> np.ndarray:
        batcher = Batcher(student, lambda rows: None, 0)
        first, second, third = (asyncio.create_task(batcher.probabilities(drawn(rows))) for rows in (1, 2, 3))
        await asyncio.sleep(0)
        second.cancel()
        await first
        return await third

    np.testing.assert_allclose(asyncio.run(ask()), student.probabilities(drawn(3)), atol=1e-6)
