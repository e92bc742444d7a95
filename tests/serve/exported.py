"""Exported students with random weights, as a finished run's would be."""

from typing import Any

import numpy as np

from rbm_dist import __version__
from rbm_dist.serve.format import Column, Features, ModelFile, NetworkFacts, NodeId
from tests.serve.reference import random_student

NUMBERS = tuple(Column(name=f"x{k}", how="number", type="double", width=1) for k in range(4))
MIXED = (
    Column(name="age", how="number", type="double", width=1),
    Column(name="emb", how="list", type="list of float", width=3),
    Column(name="colour", how="one_hot", type="text", width=3, values=("blue", "green", "red")),
    Column(name="member", how="bool", type="bool as text", width=1),
    Column(name="price", how="text", type="number as text", width=1),
)


def exported(
    kind: str = "rbm", columns: tuple[Column, ...] = NUMBERS, inputs: tuple[str, ...] = ("feat",),
    missing: bool = False, rows: str = "", class_names: tuple[str, ...] | None = ("cat", "dog", "owl"), **changes: Any,
) -> tuple[ModelFile, dict[str, np.ndarray]]:  # fmt: skip
    """What `model.json` says, and the arrays. Features are shifted and scaled; with `missing` two have indicators."""
    width = sum(column.width for column in columns)
    indicators = np.array([0, width - 1]) if missing else np.empty(0, np.int64)
    widths = {"feat": width + len(indicators), "pos": 6, "prop": 3}
    student, facts = random_student(
        kind, sum(widths[name] for name in inputs), 3, inputs=list(inputs), **{"hidden": 32} | changes
    )
    rng = np.random.default_rng(5)
    tensors = {name: each.numpy() for name, each in student.state_dict().items()}
    scaling = np.stack([rng.standard_normal(width), 3 + rng.standard_normal(width), rng.random(width) + 0.5])
    tensors |= {"scaling.columns": scaling, "scaling.indicators": indicators.astype(np.int64)}
    model = ModelFile(
        name=kind, rbm_dist=__version__, network=NetworkFacts.model_validate(facts), class_names=class_names,
        inputs={name: width if name == "feat" else widths[name] for name in inputs},
        features=Features(columns=columns, named=True, missing=missing, rows=rows, decimal=",", na_values=("?",)),  # type: ignore[arg-type]
        id=NodeId(column="id", kind="text", arrow="string"),
        made_from={"run": "small", "graph": {"num_nodes": 90, "num_edges": 200}},
    )  # fmt: skip
    return model, tensors
