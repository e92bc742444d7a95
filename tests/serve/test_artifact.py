"""The artifact: a student comes back as it was saved; whatever is not that artifact is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.serve.artifact import load_student, load_weights, save_student
from tests.serve.reference import random_student


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("kind", ["mlp", "wide mlp", "ensemble", "moe", "rbm", "rbm with options"])
def test_a_student_comes_back_as_it_was(tmp_path: Path, kind: str, norm: str) -> None:
    changes = {
        "wide mlp": {"hidden": 28},
        "ensemble": {"ensemble_size": 2, "inputs": ["feat", "pos"]},
        "rbm routed by its input": {"routing": "input"},
        "rbm with options": {"routing_temperature": 0.3, "input_attention": True, "inputs": ["pos"]},
    }
    student, facts = random_student(kind.split()[-1 if "mlp" in kind else 0], norm=norm, **changes.get(kind, {}))
    save_student(str(tmp_path), student, facts)
    loaded = load_student(str(tmp_path))
    assert not loaded.training
    expected = student.state_dict()
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    x_BD = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x_BD)[0], student(x_BD)[0])
    assert loaded.inputs == student.inputs == tuple(facts["inputs"])


def test_a_student_on_every_kind_of_storage(url: str) -> None:
    student, facts = random_student("rbm")
    save_student(f"{url}/student/rbm", student, facts)
    assert storage.listdir(f"{url}/student/rbm") == ["model.json", "model.safetensors"]
    loaded = load_student(f"{url}/student/rbm")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.json: no such file"):
        load_student(str(tmp_path))
    student, facts = random_student("mlp")
    save_student(str(tmp_path), student, facts)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        load_student(str(tmp_path))


def test_another_version_is_refused(tmp_path: Path) -> None:
    student, facts = random_student("mlp")
    save_student(str(tmp_path), student, facts)
    (tmp_path / "model.json").write_text(json.dumps(facts | {"version": 99}))
    with pytest.raises(InputError, match=r"model\.json: not a model of version 3"):
        load_student(str(tmp_path))


@pytest.mark.parametrize("change", [{"hidden": "many"}, {"hidden": -3}, {"experts": 4}, {"inputs": None}])
def test_facts_that_make_no_sense_are_refused(tmp_path: Path, change: dict) -> None:
    student, facts = random_student("mlp")
    save_student(str(tmp_path), student, facts | change)
    with pytest.raises(InputError, match=r"model\.json: does not describe a student"):
        load_student(str(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-10], lambda raw: raw[:20], lambda raw: b"", lambda raw: b"\x80\x04K\x01."],
    ids=["truncated", "header alone", "empty", "a pickle"],
)  # fmt: skip
def test_damaged_weights_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    student, facts = random_student("mlp")
    save_student(str(tmp_path), student, facts)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors: not the weights of this model"):
        load_student(str(tmp_path))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    student, facts = random_student("rbm")
    save_student(str(tmp_path), student, facts)
    for changes in ({"num_layers": 2}, {"num_experts": 5}, {"hidden": 8}):
        other, _ = random_student("rbm", **changes)
        with pytest.raises(InputError, match="not the weights of this model") as caught:
            load_weights(f"{tmp_path}/model.safetensors", other)
        assert "\n" not in str(caught.value)
