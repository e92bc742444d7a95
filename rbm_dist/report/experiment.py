"""The results of an experiment: tidy rows, one per run, and the tables that a person reads.

A row is a dictionary with the keys of `COLUMNS`. Accuracies are shares in the rows and percentages in the tables, where
they stand as mean ± sample standard deviation over the seeds.
"""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Group
from rich.table import Table

Row = dict[str, Any]

COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("dataset", "setting", "student", "objective")]
    + [("seed", pa.int64())]
    + [(name, pa.float64()) for name in ("val", "test", "unseen", "accuracy", "test_peak_over_epochs")]
    + [(name, pa.int64()) for name in ("epochs", "parameters", "multiply_adds")]
    + [(name, pa.float64()) for name in ("seconds", "teacher_val", "teacher_accuracy", "teacher_confidence")]
    + [("merged", pa.bool_())]
    + [(name, pa.float64()) for name in ("averaged", "permuted", "distance", "effective_experts")]
    + [("config_hash", pa.string())]
)
"""`accuracy` is the reported one: over the unseen nodes where there are some, else over the test nodes.

`merged` to `effective_experts` are of an RbM alone: whether it is served as an MLP, and `stages.local.train`'s figures.
"""

NOTHING = "–"
_MLP = "†"


@dataclass(frozen=True)
class Grid:
    """A table: a title, what its figures are, a header, rows of text."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{self.note}\n\n{table}\n"


def tidy(rows: list[Row]) -> pa.Table:
    """The rows as a table with the columns of `COLUMNS`."""
    return pa.Table.from_pylist([{name: row[name] for name in COLUMNS.names} for row in rows], schema=COLUMNS)


def table_files(name: str, table: pa.Table) -> dict[str, bytes]:
    """A table as the contents of a `.csv` and of a `.parquet` file, by the file's name."""
    parquet, text = pa.BufferOutputStream(), pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.csv.write_csv(table, text)
    return {f"{name}.csv": text.getvalue().to_pybytes(), f"{name}.parquet": parquet.getvalue().to_pybytes()}


def results_markdown(rows: list[Row], seeds: int, notes: list[str], facts: dict[str, str]) -> str:
    """The whole of `results.md`. `seeds`: how many were asked for; a figure from fewer says so in parentheses.

    `notes` are what a reader must know first (what is missing), `facts` where the figures come from.
    """
    sections = [f"{note}\n" for note in notes]
    for (setting,), of_setting in _groups(rows, "setting").items():
        sections += [f"## {setting}\n", *(grid.markdown() for grid in grids(of_setting, seeds))]
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n".join(["# Results\n", *sections, f"## Where the figures come from\n\n{lines}\n"])


def accuracy_tables(rows: list[Row], seeds: int) -> Group:
    """The first table of every setting, for the terminal."""
    tables = []
    for (setting,), of_setting in _groups(rows, "setting").items():
        grid = grids(of_setting, seeds)[0]
        table = Table(*grid.header, title=f"{setting}: accuracy, %", caption="the epoch chosen on validation")
        for line in grid.rows:
            table.add_row(*(re.sub(r"\*\*(.*)\*\*", r"[bold]\1[/]", text) for text in line))
        tables.append(table)
    return Group(*tables)


def grids(rows: list[Row], seeds: int) -> list[Grid]:
    """The tables of one setting."""
    nodes = "unseen nodes" if any(row["unseen"] is not None for row in rows) else "test nodes"
    note = f"% of the {nodes}, at the epoch chosen on validation; mean ± standard deviation over seeds."
    return [
        _accuracy_grid(rows, seeds, note),
        _selected_grid(rows, seeds),
        _grid(rows, "Spread over seeds", "The student's standard deviation divided by the teacher's.", _spread),
        _grid(
            rows,
            "Not a result: the peak over epochs, chosen on the test nodes",
            "The highest accuracy that any epoch had on the nodes that are reported. No one could have chosen that "
            "epoch without their labels; it stands here for comparison with tables that print it.",
            lambda cell: _mean_sd(_values(cell, "test_peak_over_epochs"), seeds),
        ),
        _grid(rows, "Cost", "Parameters (routing memories included) / multiply-adds per node at inference.", _cost),
        *_experts_grids(rows),
    ]


def _experts_grids(rows: list[Row]) -> list[Grid]:
    """The table of what experts are worth, if there are RbMs."""
    mixtures = [row for row in rows if row["merged"] is not None]
    note = (
        "What the mixture's accuracy loses, in points, when the experts of each layer are averaged into one / when "
        "memories are permuted; how far experts are from their mean, relative to their length; and how many of the "
        "seeds' students are served as the MLP of that average, because validation does not tell the two apart."
    )
    return [_grid(mixtures, "Are the experts different?", note, _experts)] if mixtures else []


def _grid(rows: list[Row], title: str, note: str, text: Callable[[list[Row]], str]) -> Grid:
    """Students × objectives by datasets; `text` makes a cell of its rows, of which there may be none."""
    datasets = _names(rows, "dataset")
    body = []
    for names, of_method in _groups(rows, "student", "objective").items():
        cells = _groups(of_method, "dataset")
        body.append([" · ".join(names), *(text(cells.get((dataset,), [])) for dataset in datasets)])
    return Grid(title, note, ["", *datasets], body)


def _accuracy_grid(rows: list[Row], seeds: int, note: str) -> Grid:
    datasets = _names(rows, "dataset")
    by_dataset = _groups(rows, "dataset")
    teacher = [_teacher_values(by_dataset[dataset,]) for dataset in datasets]
    students = {}
    for names, of_method in _groups(rows, "student", "objective").items():
        of_dataset = _groups(of_method, "dataset")
        students[" · ".join(names)] = [_values(of_dataset.get((dataset,), []), "accuracy") for dataset in datasets]
    columns = [[_mean(cell) for cell in column if cell] for column in zip(*students.values(), strict=True)]
    columns.append([mean for mean in map(_mean_of_means, students.values()) if mean is not None])
    body = [["teacher", *(_mean_sd(cell, seeds) for cell in teacher), _percent(_mean_of_means(teacher))]]
    for name, cells in students.items():
        marks = [_merged(rows, name, dataset) for dataset in datasets]
        texts = [f"{_mean_sd(cell, seeds)}{mark}" for cell, mark in zip(cells, marks, strict=True)]
        texts.append(_percent(_mean_of_means(cells)))
        means = [*(_mean(cell) if cell else None for cell in cells), _mean_of_means(cells)]
        best = [mean is not None and mean == max(column) for mean, column in zip(means, columns, strict=True)]
        body.append([name, *(f"**{text}**" if bold else text for text, bold in zip(texts, best, strict=True))])
    if any(row["merged"] for row in rows):
        note += f" {_MLP} in effect an MLP, and served as one, on most seeds."
    return Grid("Accuracy", f"{note} Bold: the best student.", ["", *datasets, "mean"], body)


def _merged(rows: list[Row], method: str, dataset: str) -> str:
    """A mark for an RbM that is an MLP on most seeds."""
    of_cell = [row for row in rows if (f"{row['student']} · {row['objective']}", row["dataset"]) == (method, dataset)]
    return f" {_MLP}" if 2 * sum(bool(row["merged"]) for row in of_cell) > len(of_cell) else ""


def _selected_grid(rows: list[Row], seeds: int) -> Grid:
    datasets = _names(rows, "dataset")
    body = []
    for (student,), of_student in _groups(rows, "student").items():
        texts: list[str] = []
        accuracies: list[list[float]] = []
        for dataset in datasets:
            objectives = _groups([row for row in of_student if row["dataset"] == dataset], "objective")
            (chosen,) = max(objectives, key=lambda name: _mean(_values(objectives[name], "val")), default=(NOTHING,))
            accuracies.append(_values(objectives.get((chosen,), []), "accuracy"))
            texts.append(f"{_mean_sd(accuracies[-1], seeds)} {chosen}" if objectives else NOTHING)
        body.append([f"{student} (best on validation)", *texts, _percent(_mean_of_means(accuracies))])
    return Grid(
        "Accuracy with the objective chosen on validation",
        "The same figures, of the objective whose mean validation accuracy is the student's highest.",
        ["", *datasets, "mean"],
        body,
    )


def _spread(rows: list[Row]) -> str:
    student, teacher = _values(rows, "accuracy"), _teacher_values(rows)
    if len(student) < 2 or len(teacher) < 2 or statistics.stdev(teacher) == 0:
        return NOTHING
    return f"{statistics.stdev(student) / statistics.stdev(teacher):.2f}"


def _cost(rows: list[Row]) -> str:
    if not rows:
        return NOTHING
    return " / ".join(short(_mean(_values(rows, column))) for column in ("parameters", "multiply_adds"))


def _experts(rows: list[Row]) -> str:
    if not rows:
        return NOTHING
    lost = " / ".join(f"{100 * _mean(_values(rows, column)):.1f}" for column in ("averaged", "permuted"))
    return f"{lost}, {_mean(_values(rows, 'distance')):.2f}, MLP: {sum(row['merged'] for row in rows)} of {len(rows)}"


def _values(rows: list[Row], column: str) -> list[float]:
    return [row[column] for row in rows if row[column] is not None]


def _teacher_values(rows: list[Row]) -> list[float]:
    """The teacher's accuracy, once per seed: students share it. Where they had several teachers, their mean."""
    seeds = _groups(rows, "seed").values()
    return [_mean(sorted(set(_values(of_seed, "teacher_accuracy")))) for of_seed in seeds]


def _groups(rows: list[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by their values in some columns, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _names(rows: list[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _mean_of_means(cells: list[list[float]]) -> float | None:
    """Over the datasets; None unless each has a figure."""
    return _mean([_mean(cell) for cell in cells]) if all(cells) else None


def _mean_sd(shares: list[float], seeds: int) -> str:
    if not shares:
        return NOTHING
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    fewer = f" ({len(shares)})" if len(shares) < seeds else ""
    return f"{100 * _mean(shares):.1f}{spread}{fewer}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"


def short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
