"""The results table: every figure where a person looks for it."""

import io
from typing import Any

import pytest
from rich.console import Console

from rbm_dist.report.table import results_table
from tests.report.layer import mixture_figures

RESULTS: dict[str, Any] = {
    "baselines": {"majority": {"val": 0.2, "test": 0.21}, "regression": {"val": 0.7, "test": 0.75}},
    "teacher": {"val": 0.81, "test": 0.8},
    "students": {
        "mlp": {"val": 0.5, "test": 0.49},
        "rbm": {"val": 0.6123, "test": 0.6087, "mixture": mixture_figures()},
    },
    "latency_us": {
        "teacher": {"1": 1234.5, "1024": 99.0},
        "mlp": {"1": 20.0, "1024": 0.4},
        "rbm": {"1": 80.0, "1024": 2.0},
    },
    "seconds": {"source": 0.5, "teacher": 10.25},
}


def lines(results: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(results))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("majority class", ["20.0 %", "21.0 %", "–", "–", "yes"]),
        ("logistic regression", ["70.0 %", "75.0 %", "–", "–", "yes"]),
        ("teacher (GraphSAGE)", ["81.0 %", "80.0 %", "1,234.5", "99.0", "no"]),
        ("MLP (GLNN)", ["50.0 %", "49.0 %", "20.0", "0.4", "yes"]),
        ("RbM", ["61.2 %", "60.9 %", "80.0", "2.0", "yes"]),
    ],
)
def test_a_row_per_model(name: str, figures: list[str]) -> None:
    [row] = [line for line in lines(RESULTS) if line.startswith(f"│ {name} ")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [name, *figures]


def test_expert_load_and_time_per_stage() -> None:
    shown = "\n".join(lines(RESULTS))
    assert "share of rows per expert, layer 0: 50%  25%  25% (as 2.8 that share them equally)\n" in shown
    assert "share of rows per expert, layer 1: 50%  0%  50%; without any: 1 (as 2.0 that" in shown
    assert "source 0.5  teacher 10.2  (total 10.8)" in shown


def below(**changes: Any) -> str:
    """What stands below the table of a run, with changed figures of the RbM; spaces and line breaks made equal."""
    rbm = RESULTS["students"]["rbm"] | {name: changes.pop(name) for name in ("val",) if name in changes}
    rbm |= {"mixture": mixture_figures() | changes}
    shown = "\n".join(lines(RESULTS | {"students": RESULTS["students"] | {"rbm": rbm}}))
    return " ".join(shown[shown.rindex("┘") :].split())


def test_an_rbm_that_is_an_mlp_says_so() -> None:
    figures = "RbM with all its experts: 61.2 % on validation; averaged into one: 60.1 %; memories permuted: 50.2 %"
    assert f"{figures}; experts are 0.30, 0.13 of their length from their mean, by layer" in below()
    assert "in effect an MLP" not in below()
    assert "not ahead of the MLP" not in below()
    assert "The RbM is in effect an MLP: its experts averaged into one do as well on validation" in below(merged=True)
    assert "On validation the RbM is not ahead of the MLP (50.0 %, 50.0 %)" in below(val=0.5)
    assert "not ahead" not in below(val=0.5, merged=True), "it is an MLP itself"
    merged = {"rbm": {"val": 0.5, "test": 0.5, "mixture": mixture_figures() | {"merged": True}}}
    assert any("RbM, as an MLP" in line for line in lines(RESULTS | {"students": merged}))


def test_one_memory_has_no_layer() -> None:
    shown = below(expert_load=[[0.5, 0.5]], effective_experts=[2.0])
    assert "share of rows per expert: 50% 50% (as 2.0" in shown


def test_what_was_not_measured_is_a_dash() -> None:
    results = RESULTS | {"students": {"mlp": {"val": None, "test": 0.5}}}
    shown = lines(results)
    [row] = [line for line in shown if line.startswith("│ MLP")]
    assert [cell.strip() for cell in row.strip("│").split("│")][1:3] == ["–", "50.0 %"]
    assert not any("expert" in line or "RbM" in line for line in shown)


def test_a_teacher_that_does_not_beat_the_baselines_is_named_and_the_keys_to_change() -> None:
    def warning(teacher_val: float) -> str:
        shown = " ".join(lines(RESULTS | {"teacher": {"val": teacher_val, "test": 0.9}}))
        return shown[shown.rindex("┘") : shown.index("seconds per stage")]

    assert "no better" not in warning(0.7001)
    for val in (0.7, 0.3):
        assert "no better than the baseline 'logistic regression'" in warning(val)
        for key in ("source.normalize", "teacher.norm", "teacher.weight_decay", "teacher.epochs", "teacher.lr"):
            assert key in warning(val)


def test_a_run_without_baselines_is_shown_as_it_is() -> None:
    older = {name: figures for name, figures in RESULTS.items() if name != "baselines"}
    shown = lines(older)
    assert not any("majority" in line or "no better" in line for line in shown)
    assert any(line.startswith("│ teacher") for line in shown)


@pytest.mark.parametrize(("before", "worse"), [(0.79, False), (0.83, True)])
def test_what_smoothing_did_is_told_and_warned_about(before: float, worse: bool) -> None:
    soft = {"confidence": 0.7, "calibration_error": 0.05, "disagreement": None, "unsmoothed_val": before}
    shown = " ".join("\n".join(lines(RESULTS | {"soft_labels": soft})).split())
    assert f"smoothed over edges (soft_labels.smooth): {100 * before:.1f} % right on validation before" in shown
    assert ("Smoothing made the soft labels worse: lower soft_labels.smooth.damping" in shown) == worse
    plain = {name: figure for name, figure in soft.items() if name != "unsmoothed_val"}
    assert "mooth" not in "\n".join(lines(RESULTS | {"soft_labels": plain}))


def by_class(*shares: float | None, names: list[str] | None = None) -> dict[str, Any]:
    """The figures of classes on which the RbM has these accuracies; None: no test nodes."""
    classes = [
        {
            "name": names[cls] if names else str(cls),
            "nodes": 0 if share is None else 40,
            "accuracy": {"mlp": 0.3, "rbm": share},
        }
        for cls, share in enumerate(shares)
    ]
    return {"classes": classes, "class_names": names}


def test_the_weakest_classes_of_the_served_student_are_a_line() -> None:
    def line(**figures: Any) -> str:
        shown = "\n".join(lines(RESULTS | figures))
        return next((each for each in shown.splitlines() if "weakest" in each), "")

    unnamed = by_class(0.9, None, 0.5, 0.6, 0.2, 0.3)
    assert line(**unnamed) == "RbM is weakest on: 4 (20.0 %), 5 (30.0 %), 2 (50.0 %)"
    named = by_class(0.9, 0.5, names=["owls", "cats of\nall \x1b[31mcolours"])
    assert line(**named) == "RbM is weakest on: cats of a… (50.0 %)"
    assert len(line(**by_class(0.1, 0.2, 0.3, names=["a very long name"] * 3))) <= 80
    assert line(**by_class(0.9, 0.5)) == "", "two classes without names"
    assert line(**by_class(0.9, 0.9, 0.9)) == "", "none below the whole"
    assert line() == "", "a run of an earlier version"
    mlp = {"students": {"mlp": RESULTS["students"]["mlp"]}}
    assert line(**by_class(0.9, 0.9, 0.9), **mlp).startswith("MLP (GLNN) is weakest on: 0 (30.0 %)")
