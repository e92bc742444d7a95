"""The tables of an experiment, against figures worked out by hand."""

import io
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from rbm_dist.report.experiment import COLUMNS, Grid, Row, accuracy_tables, grids, results_markdown, tidy


def row(dataset: str, method: str, seed: int, accuracy: float, **figures: object) -> Row:
    student, objective = method.split()
    return {
        "dataset": dataset, "setting": "transductive", "student": student, "objective": objective, "seed": seed,
        "val": 0.5, "test": accuracy, "unseen": None, "accuracy": accuracy, "test_peak_over_epochs": accuracy + 0.02,
        "epochs": 9, "parameters": 2_500, "multiply_adds": 1_234_567, "seconds": 1.5, "teacher_val": 0.5,
        "teacher_accuracy": 0.8, "teacher_confidence": 0.9, "config_hash": "0" * 16,
        "merged": None, "averaged": None, "permuted": None, "distance": None, "effective_experts": None, **figures,
    }  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    """Two datasets, three seeds; MLP KD has no run on `b`, RbM KRD one only."""
    teacher = {0: 0.80, 1: 0.82, 2: 0.84}  # mean 82, deviation 2
    accuracy = {
        ("a", "MLP KD"): [0.70, 0.74, 0.78],  # mean 74, deviation 4
        ("a", "RbM KD"): [0.75, 0.75, 0.75],
        ("a", "RbM KRD"): [0.73, 0.74, 0.78],  # mean 75, variance (4 + 1 + 9) / 2 = 7
        ("b", "RbM KD"): [0.60, 0.61, 0.62],  # mean 61, deviation 1
        ("b", "RbM KRD"): [0.66],
    }
    val = {("a", "RbM KD"): 0.6, ("a", "RbM KRD"): 0.5, ("b", "RbM KD"): 0.6, ("b", "RbM KRD"): 0.61}
    return [
        row(*cell, seed, share, teacher_accuracy=teacher[seed], val=val.get(cell, 0.5))
        for cell, shares in accuracy.items()
        for seed, share in enumerate(shares)
    ]


def table(rows: list[Row], title: str) -> dict[str, list[str]]:
    (found,) = [grid for grid in grids(rows, seeds=3) if grid.title.startswith(title)]
    return {line[0]: line[1:] for line in [found.header, *found.rows]}


def test_the_spread_is_relative_to_the_teachers(rows: list[Row]) -> None:
    assert table(rows, "Spread") == {
        "": ["a", "b"],
        "MLP · KD": ["2.00", "–"],
        "RbM · KD": ["0.00", "0.50"],
        "RbM · KRD": ["1.32", "–"],  # √7 / 2
    }


def test_the_accuracy_table(rows: list[Row]) -> None:
    found = grids(rows, seeds=3)[0]
    assert found.header == ["", "a", "b", "mean"]
    assert found.rows == [
        ["teacher", "82.0 ± 2.0", "82.0 ± 2.0", "82.0"],
        ["MLP · KD", "74.0 ± 4.0", "–", "–"],
        ["RbM · KD", "**75.0 ± 0.0**", "61.0 ± 1.0", "68.0"],
        ["RbM · KRD", "**75.0 ± 2.6**", "**66.0 (1)**", "**70.5**"],
    ]


def test_the_objective_is_chosen_on_validation_not_on_test(rows: list[Row]) -> None:
    assert table(rows, "Accuracy with")["RbM (best on validation)"] == ["75.0 ± 0.0 KD", "66.0 (1) KRD", "70.5"]
    assert table(rows, "Accuracy with")["MLP (best on validation)"] == ["74.0 ± 4.0 KD", "–", "–"]
    better_on_test = [each | {"accuracy": 0.99} if each["objective"] == "KRD" else each for each in rows]
    assert table(better_on_test, "Accuracy with")["RbM (best on validation)"][0] == "75.0 ± 0.0 KD"


def test_the_peak_stands_in_its_own_table_alone(rows: list[Row]) -> None:
    found = table(rows, "Not a result")
    assert found["MLP · KD"] == ["76.0 ± 4.0", "–"]
    others = [each | {"test_peak_over_epochs": None} for each in rows]
    assert table(others, "Not a result")["RbM · KD"] == ["–", "–"]
    peaks = [each | {"test_peak_over_epochs": 0.123} for each in rows]
    text = results_markdown(peaks, 3, [], {})
    before, after = text.split("### Not a result")
    assert "12.3" not in before
    assert "12.3" in after


def test_cost(rows: list[Row]) -> None:
    assert table(rows, "Cost")["MLP · KD"] == ["2.5 k / 1.23 M", "–"]


def test_in_the_inductive_setting_the_unseen_nodes_count() -> None:
    rows = [row("a", "MLP KD", seed, 0.7 + seed / 10, unseen=0.7 + seed / 10, test=0.1) for seed in (0, 1)]
    assert "unseen nodes" in grids(rows, 2)[0].note
    assert grids(rows, 2)[0].rows[1][1] == "**75.0 ± 7.1**"  # √(2 · 5²)
    assert "test nodes" in grids([each | {"unseen": None} for each in rows], 2)[0].note


def test_a_teacher_counts_once_per_seed_however_many_students_it_has(rows: list[Row]) -> None:
    """Else the deviation would shrink with the number of students."""
    assert grids(rows + rows, 3)[0].rows[0][1] == "82.0 ± 2.0"
    two = [row("a", "MLP KD", 0, 0.5, teacher_accuracy=share) for share in (0.6, 0.8, 0.8)]
    assert grids(two, 1)[0].rows[0][1] == "70.0"


def test_the_order_of_the_rows_decides_the_order_of_the_table_alone(rows: list[Row]) -> None:
    expected, found = ({line[0]: sorted(line[1:]) for line in grids(each, 3)[0].rows} for each in (rows, rows[::-1]))
    assert list(found) == ["teacher", "RbM · KRD", "RbM · KD", "MLP · KD"]
    assert found == expected


def test_markdown(rows: list[Row]) -> None:
    rows += [each | {"setting": "inductive"} for each in rows]
    text = results_markdown(rows, 3, ["c is skipped."], {"seeds": "3", "date": "today"})
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## transductive", "## inductive", "## Where the figures come from",
    ]  # fmt: skip
    assert text.index("c is skipped.") < text.index("## transductive")
    assert text.endswith("- seeds: 3\n- date: today\n")
    grid = Grid("T", "n", ["", "a"], [["x", "1"], ["y", "2"]])
    assert grid.markdown() == "### T\n\nn\n\n|  | a |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"


def test_nothing_done_yet() -> None:
    assert results_markdown([], 3, [], {"seeds": "3"}).startswith("# Results\n")
    assert tidy([]).schema == COLUMNS


def test_students_that_are_mlps_are_marked_and_counted(rows: list[Row]) -> None:
    def mixture(each: Row) -> dict[str, Any]:
        lost = 0.02 if each["dataset"] == "a" else 0.0
        experts = {"averaged": lost, "permuted": 2 * lost, "distance": 0.5, "effective_experts": 3.5}
        return experts | {"merged": each["dataset"] == "b" or each["seed"] == 0}

    rows = [each | mixture(each) if each["student"] == "RbM" else each for each in rows]
    accuracy, *_, experts = grids(rows, 3)
    assert experts.title == "Are the experts different?"
    assert experts.rows[0] == ["RbM · KD", "2.0 / 4.0, 0.50, MLP: 1 of 3", "0.0 / 0.0, 0.50, MLP: 3 of 3"]
    assert [line[0] for line in experts.rows] == ["RbM · KD", "RbM · KRD"]
    cells = {line[0]: line[1:3] for line in accuracy.rows}
    assert cells["RbM · KD"] == ["**75.0 ± 0.0**", "61.0 ± 1.0 †"]
    assert cells["RbM · KRD"][1] == "**66.0 (1) †**"
    assert "† in effect an MLP" in accuracy.note


def test_tidy_rows_come_back(rows: list[Row]) -> None:
    table = tidy([each | {"something": "else"} for each in rows])
    assert table.schema == COLUMNS
    assert table.to_pylist() == rows
    assert table.schema.field("unseen").type == pa.float64(), "though it has no value"


def test_the_terminal_shows_the_same_figures(rows: list[Row]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(accuracy_tables(rows, 3))
    shown = console.export_text()
    assert "75.0 ± 2.6" in shown
    assert "*" not in shown
