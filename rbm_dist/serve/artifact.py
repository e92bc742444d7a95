"""A trained student as two files: `model.json` (what to build) and `model.safetensors` (its weights). No pickle."""

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.models.student import Ensemble, Student, make_mlp, make_moe, mlp_to_rbm, rbm_to_mlp

_VERSION = 3
_EXPERTS = "experts"  # the folder of an RbM that is served as an MLP


def save_weights(url: str, model: nn.Module) -> storage.FileInfo:
    """Write a model's weights."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = save_tensors(tensors)
    with storage.atomic_writer(url) as stream:
        stream.write(data)
    return stream.info


def load_weights(url: str, model: nn.Module) -> None:
    """Fill a model with saved weights. Raises `InputError` if they are missing, damaged or of another model."""
    fs, path = storage.filesystem(url)
    try:
        tensors = load_tensors(fs.cat_file(path))
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{url}: not the weights of this model: {' '.join(str(error).split())[:500]}") from None


def save_student(url: str, student: Student, facts: dict[str, Any]) -> None:
    """Write a whole (unsharded) student. `facts` are the arguments of `empty_student`."""
    save_weights(storage.join(url, "model.safetensors"), student)
    storage.write_json(storage.join(url, "model.json"), {"version": _VERSION, **facts})


def save_merged(url: str, mixture: Student, facts: dict[str, Any]) -> None:
    """Write the MLP of an RbM's averaged experts in its place, and the RbM itself below, in `experts/`."""
    save_student(storage.join(url, _EXPERTS), mixture, facts)
    save_student(url, rbm_to_mlp(mixture), {**facts, "kind": "mlp"})


def load_mixture(url: str) -> tuple[Student, bool]:
    """Load an RbM with all its experts, and whether an MLP is served in its place."""
    served = load_student(url)
    return (served, False) if served.routed_layers else (load_student(storage.join(url, _EXPERTS)), True)


def load_student(url: str) -> Student:
    """Load a student for inference."""
    facts = storage.read_json(storage.join(url, "model.json"))
    if facts.pop("version", None) != _VERSION:
        raise InputError(f"{url}/model.json: not a model of version {_VERSION}")
    try:
        student = empty_student(**facts)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{url}/model.json: does not describe a student; it was changed") from None
    load_weights(storage.join(url, "model.safetensors"), student)
    return student.eval()


def empty_student(
    kind: str,
    inputs: list[str],
    num_features: int,
    hidden: int,
    num_classes: int,
    num_layers: int,
    norm: str,
    num_experts: int,
    top_k: int,
    routing: str,
    routing_temperature: float,
    input_attention: bool,
    ensemble_size: int,
) -> Student:
    """A student of the right shape, to load weights into. `kind` is `mlp`, `ensemble`, `moe` or `rbm`.

    `inputs` are the arrays that make its input, `num_features` their width. `routing`: `input` or `layers`.
    """

    def mlp() -> Student:
        return make_mlp(num_features, hidden, num_classes, num_layers, norm, dropout=0.0, seed=0)

    student = mlp()
    if kind == "ensemble":
        student = Ensemble([mlp() for _ in range(ensemble_size)])
    elif kind == "moe":
        student = make_moe(student, num_experts, top_k, seed=0)
    elif kind == "rbm":
        later = num_layers - 1 if routing == "layers" else 0
        memories = [torch.zeros(num_experts, width) for width in (num_features, *[hidden] * later)]
        student = mlp_to_rbm(student, memories, top_k, temperature=routing_temperature, input_attention=input_attention)
    student.inputs = tuple(inputs)
    return student
