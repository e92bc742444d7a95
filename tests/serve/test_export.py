"""The folder of an exported student: what is in it, and what is never written."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from rbm_dist.errors import InputError, RunError
from rbm_dist.serve.export import compare, export
from rbm_dist.serve.format import FILES
from rbm_dist.serve.onnx_graph import build
from tests.serve.exported import MIXED, exported


def test_a_folder_says_all_that_is_to_be_known(tmp_path: Path) -> None:
    model, tensors = exported(columns=MIXED, missing=True)
    export(str(tmp_path), model, tensors)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    said = json.loads((tmp_path / "model.json").read_text())
    assert said["class_names"] == ["cat", "dog", "owl"]
    assert [column["name"] for column in said["features"]["columns"]] == ["age", "emb", "colour", "member", "price"]
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    np.testing.assert_array_equal(written["scaling.columns"], tensors["scaling.columns"])
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [each.name for each in graph.graph.input] == ["feat"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the number of rows is free"
    card = (tmp_path / "README.md").read_text()
    assert "cat, dog, owl" in card
    assert "| `colour` | one of blue, green, red | 3 |" in card


def test_another_folder_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds thesis.tex, but no exported student"):
        export(str(tmp_path), *exported())
    (tmp_path / "thesis.tex").rename(tmp_path / "model.json")
    (tmp_path / "model.json").write_text('{"format": "another"}')
    with pytest.raises(InputError, match="but no exported student"):
        export(str(tmp_path), *exported())


def test_a_student_is_replaced_and_an_unfinished_one_finished(tmp_path: Path) -> None:
    export(str(tmp_path), *exported())
    (tmp_path / "model.json").unlink()  # as a kill before the last file leaves it
    export(str(tmp_path), *exported())
    before = json.loads((tmp_path / "model.json").read_text())
    export(str(tmp_path), *exported("mlp"))
    after = json.loads((tmp_path / "model.json").read_text())
    assert (before["name"], after["name"]) == ("rbm", "mlp")


@pytest.mark.parametrize("num_experts", [3, 12])  # all at once; for one row, its own alone
def test_an_onnx_file_of_other_numbers_is_refused(num_experts: int) -> None:
    model, tensors = exported(num_experts=num_experts, top_k=1)
    assert compare(model, tensors, build(model, tensors).SerializeToString()) < 1e-5
    other = dict(tensors)
    name = "layers.1.experts.weight_LDO"
    other[name] = tensors[name] * 1.05
    with pytest.raises(RunError, match=r"its probabilities are .* from torch's; not written"):
        compare(model, tensors, build(model, other).SerializeToString())
