"""A loaded student: one answer from every engine for every kind of rows, and nothing imported that it needs not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.special import softmax

import rbm_dist
from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.serve.export import drawn_inputs, export
from rbm_dist.serve.loaded import LoadedStudent
from rbm_dist.sources.scaling import Scaling
from tests.serve.exported import MIXED, exported
from tests.serve.reference import class_probabilities, random_student

ENGINES = ("native", "onnx")
BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("student"))
    export(url, *exported())
    return url


@pytest.mark.parametrize("engine", ENGINES)
def test_probabilities_are_those_of_the_formulas(folder: str, engine: Any) -> None:
    model, tensors = exported()
    raw = drawn_inputs(model, tensors, 50)["feat"]
    scaling = Scaling(*tensors["scaling.columns"], "", tensors["scaling.indicators"])
    expected = class_probabilities(random_student("rbm", 4, 3, hidden=32)[0], scaling.apply(raw))
    classes, probabilities = rbm_dist.load(folder, engine=engine).predict(raw)
    np.testing.assert_allclose(probabilities, expected, rtol=2e-4, atol=1e-6)
    assert classes.tolist() == [("cat", "dog", "owl")[cls] for cls in expected.argmax(1)]


@pytest.mark.parametrize("rows", ["", "sum", "length"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mlp", {}), ("ensemble", {}), ("moe", {}), ("moe", {"num_experts": 12, "top_k": 1}),
        ("rbm", {"norm": "batch"}),
        ("rbm", {"routing": "input", "top_k": 1, "num_experts": 12}), ("rbm", {"norm": "none", "top_k": 6}),
    ],
)  # fmt: skip
def test_engines_agree(tmp_path: Path, kind: str, changes: dict[str, Any], rows: str) -> None:
    model, tensors = exported(kind, MIXED, missing=True, rows=rows, **changes)
    export(str(tmp_path), model, tensors)
    native, onnx = (rbm_dist.load(str(tmp_path), engine=engine) for engine in ENGINES)  # type: ignore[arg-type]
    for count in (1, 2, 40):
        inputs = drawn_inputs(model, tensors, count, seed=7)
        inputs["feat"][count // 2, 2:5] = np.nan
        np.testing.assert_allclose(
            onnx.probabilities(inputs), native.probabilities(inputs), rtol=1e-4, atol=1e-6
        )  # fmt: skip
        [ours, theirs] = (each.explain(inputs["feat"]) for each in (native, onnx))
        assert [row["class"] for row in ours] == [row["class"] for row in theirs]
        assert [[m["experts"] for m in row["memories"]] for row in ours] == [
            [m["experts"] for m in row["memories"]] for row in theirs
        ]
        for row in ours:
            for memory in row["memories"]:
                assert all(-1.001 < cosine < 1.001 for cosine in memory["cosines"])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_rows_gives_the_same(folder: str, engine: Any) -> None:
    student = rbm_dist.load(folder, engine=engine)
    frame = pd.DataFrame(
        np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32), columns=["x0", "x1", "x2", "x3"]
    )
    expected = student.predict(frame.to_numpy()).probabilities
    mixed = frame[["x2", "x0", "x3", "x1"]].assign(other="x")
    for rows in (mixed, pa.Table.from_pandas(mixed), mixed.to_dict("records"), pa.RecordBatch.from_pandas(mixed)):
        np.testing.assert_array_equal(student.predict(rows).probabilities, expected)
    np.testing.assert_allclose(student.predict(frame.to_numpy()[0]).probabilities, expected[:1], rtol=1e-5)
    np.testing.assert_allclose(student.predict(mixed.to_dict("records")[0]).probabilities, expected[:1], rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_an_answer_are_refused(folder: str, engine: Any) -> None:
    student = rbm_dist.load(folder, engine=engine)
    rows = np.ones((4, 4), np.float32)
    for value, what in ((np.nan, "is missing or NaN"), (np.inf, "is infinite"), (-np.inf, "is infinite")):
        rows[2, 1] = value
        with pytest.raises(InputError, match=f"row 2, column x1: the feature {what}"):
            student.predict(rows)
    with pytest.raises(InputError, match=r"shape \[rows, 4\] expected, found \[2, 5\]"):
        student.predict(np.ones((2, 5)))
    assert student.predict(np.ones((0, 4))).probabilities.shape == (0, 3)
    with pytest.raises(InputError, match="has no input 'pos'"):
        student.predict(np.ones((2, 4)), pos=np.ones((2, 6)))


@pytest.mark.parametrize("engine", ENGINES)
def test_encodings_are_further_inputs(tmp_path: Path, engine: Any) -> None:
    model, tensors = exported(inputs=("feat", "pos", "prop"))
    export(str(tmp_path), model, tensors)
    student = rbm_dist.load(str(tmp_path), engine=engine)
    inputs = drawn_inputs(model, tensors, 6)
    found = student.predict(inputs["feat"], pos=inputs["pos"], prop=inputs["prop"]).probabilities
    scaled = Scaling(*tensors["scaling.columns"], "", tensors["scaling.indicators"]).apply(inputs["feat"])
    network, _ = random_student("rbm", 13, 3, hidden=32)
    expected = class_probabilities(network, np.concatenate([scaled, inputs["pos"], inputs["prop"]], 1))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    with pytest.raises(InputError, match="learned from 'pos' besides features"):
        student.predict(inputs["feat"])
    with pytest.raises(InputError, match=r"prop: shape \[6, 3\] expected, found \[5, 3\]"):
        student.predict(inputs["feat"], pos=inputs["pos"], prop=inputs["prop"][:5])
    inputs["pos"][3, 2] = np.nan
    with pytest.raises(InputError, match="pos: row 3, column 2: NaN or infinite"):
        student.predict(inputs["feat"], pos=inputs["pos"], prop=inputs["prop"])


def test_an_mlp_has_no_experts_to_explain(tmp_path: Path) -> None:
    export(str(tmp_path), *exported("mlp", class_names=None))
    [row] = rbm_dist.load(str(tmp_path)).explain([0.0, 1, 2, 3])
    assert row["memories"] == []
    assert row["class"] in (0, 1, 2)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "model.safetensors: damaged or of another version"),
        ("no weights", "model.safetensors: no such file"),
        ("json", "model.json: not valid JSON"),
        ("another json", "is not that of an exported student"),
        ("version", "of version 99, this rbm-dist reads 1"),
        ("changed", "network.top_k"),
        ("nothing", "neither an exported student nor a run"),
    ],
)
def test_what_is_no_whole_student_is_refused(tmp_path: Path, what: str, message: str) -> None:
    export(str(tmp_path), *exported())
    weights, about = tmp_path / "model.safetensors", tmp_path / "model.json"
    text = about.read_text()
    if what == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif what == "no weights":
        weights.unlink()
    elif what == "nothing":
        about.unlink()
    else:
        about.write_text(
            {"json": text[:-5], "another json": "{}", "version": text.replace('"version": 1', '"version": 99')}.get(
                what, text.replace('"top_k": 2', '"top_k": "many"')
            )
        )
    with pytest.raises(InputError, match=message):
        rbm_dist.load(str(tmp_path))


def test_a_student_lies_anywhere(url: str) -> None:
    export(storage.join(url, "student"), *exported())
    assert isinstance(rbm_dist.load(storage.join(url, "student")), LoadedStudent)


@pytest.mark.parametrize("engine", ENGINES)
def test_neither_torch_nor_ray_nor_pyg_is_imported(folder: str, engine: str) -> None:
    names = {"torch", "torch_geometric", "ray", "sklearn"} | ({"numba"} if engine == "onnx" else set())
    code = BLOCKED.format(names=names) + (
        f"import rbm_dist; student = rbm_dist.load({folder!r}, engine={engine!r})\n"
        "print(student.predict([[1, 2, 3, 4]])[0][0], len(student.explain([[1, 2, 3, 4]])))\n"
        "print(student.predict([{'x0': 1, 'x1': 2, 'x2': 3, 'x3': 4}])[0][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{second} 1"


def test_probabilities_of_a_batch_are_those_of_its_rows(folder: str) -> None:
    model, tensors = exported()
    rows, student = drawn_inputs(model, tensors, 300)["feat"], rbm_dist.load(folder)
    whole = student.predict(rows).probabilities
    np.testing.assert_allclose(np.concatenate([student.predict(row)[1] for row in rows]), whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)
    assert softmax(whole, 1).shape == (300, 3)
