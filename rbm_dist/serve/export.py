"""Writes an exported student: a folder that needs no graph, no Ray and no training code.

The ONNX file is compared with torch before anything is written: one row, which may go another way through it, and many.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save as save_tensors

from rbm_dist import storage
from rbm_dist.errors import InputError, RunError
from rbm_dist.serve import format as format_
from rbm_dist.serve.card import model_card
from rbm_dist.serve.format import ModelFile

if TYPE_CHECKING:
    from rbm_dist.models.student import Student

_COMPARED = (1, 64, 3)  # rows at once
_TOLERANCE = 1e-4  # of a probability
_NEAR = 1e-5  # rows whose choice of experts hangs on so little are not compared


def export(url: str, model: ModelFile, tensors: Mapping[str, np.ndarray]) -> ModelFile:
    """Write a student with its ONNX file and model card; `model.json` comes last. Gives what that says.

    Raises `InputError` for a folder that holds something else, `RunError` if ONNX Runtime computes something else than
    torch does.
    """
    from rbm_dist.serve.onnx_graph import build

    refuse_other_folder(url)
    proto = build(model, tensors).SerializeToString()
    compare(model, tensors, proto)
    return write(url, model, save_tensors(dict(tensors)), proto)


def write(url: str, model: ModelFile, weights: bytes, onnx_file: bytes) -> ModelFile:
    """Write the files of a student, `model.json` last: who reads a folder meanwhile finds its checksums do not fit."""
    files = {}
    for name, data in ((format_.WEIGHTS, weights), (format_.ONNX, onnx_file)):
        with storage.atomic_writer(storage.join(url, name)) as stream:
            stream.write(data)
        files[name] = stream.info
    model = model.model_copy(update={"files": files})
    with storage.atomic_writer(storage.join(url, format_.CARD)) as stream:
        stream.write(model_card(model).encode())
    storage.write_json(storage.join(url, format_.JSON), model.model_dump(mode="json"))
    return model


def refuse_other_folder(url: str) -> None:
    """Raise `InputError` if there is something below `url` that is no exported student."""
    names = [name for name in storage.listdir(url) if not any(storage.is_temporary(name, of) for of in format_.FILES)]
    if not names:
        return
    found: Any = None
    if format_.JSON in names:
        found = storage.read_json(storage.join(url, format_.JSON))
    unfinished = set(names) <= set(format_.FILES) and found is None
    if not unfinished and not (isinstance(found, dict) and found.get("format") == format_.FORMAT):
        raise InputError(f"{url}: holds {', '.join(names[:3])}, but no exported student; name another folder (--out)")


def compare(
    model: ModelFile, tensors: Mapping[str, np.ndarray], onnx_file: bytes, tolerance: float = _TOLERANCE
) -> float:
    """The largest difference between ONNX Runtime's probabilities and torch's on drawn rows. Raises `RunError`."""
    from rbm_dist.serve.onnx_engine import OnnxEngine

    engine, largest = OnnxEngine(model, onnx_file), 0.0
    for rows in _COMPARED:
        inputs = drawn_inputs(model, tensors, rows)
        expected_BC, clear_B = _by_torch(model, tensors, inputs)
        found_BC = engine.probabilities(inputs)
        apart = float(np.abs(found_BC - expected_BC)[clear_B].max(initial=0.0))
        if not apart <= tolerance:
            raise RunError(
                f"{format_.ONNX}: with {rows} rows its probabilities are {apart:.2g} from torch's; not written"
            )
        largest = max(largest, apart)
    return largest


def drawn_inputs(
    model: ModelFile, tensors: Mapping[str, np.ndarray], rows: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows such as users could have, `[rows, width]` float32 each: columns spread as those that were learned from."""
    rng = np.random.default_rng([seed, rows])
    _, shift_F, factor_F = tensors["scaling.columns"]
    inputs = {}
    for name, width in model.inputs.items():
        drawn = rng.standard_normal((rows, width))
        if name == "feat":
            drawn = shift_F + drawn / np.where(factor_F > 0, factor_F, 1)
        elif name == "prop":
            drawn = np.abs(drawn) / np.abs(drawn).sum(1, keepdims=True)
        else:
            drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        inputs[name] = drawn.astype(np.float32)
    return inputs


def torch_student(model: ModelFile, tensors: Mapping[str, np.ndarray]) -> "Student":
    """The network that was trained, from an exported student's weights in float32."""
    import torch

    from rbm_dist.serve.artifact import empty_student

    student = empty_student(**model.network.model_dump())
    student.load_state_dict(
        {name: torch.from_numpy(np.array(each)) for name, each in tensors.items() if not name.startswith("scaling.")}
    )
    return student.eval()


def _by_torch(
    model: ModelFile, tensors: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities by the network that was trained, and which rows are far enough from another choice of experts."""
    import torch

    from rbm_dist.sources.scaling import Scaling

    student = torch_student(model, tensors)
    fill_F, shift_F, factor_F = tensors["scaling.columns"]
    scaling = Scaling(fill_F, shift_F, factor_F, model.features.rows, tensors["scaling.indicators"])
    rows = [scaling.apply(each) if name == "feat" else each for name, each in inputs.items()]
    with torch.inference_mode():
        logits_BC, traces = student(torch.from_numpy(np.concatenate(rows, axis=1)))
    clear_B = np.ones(len(logits_BC), bool)
    for trace, memory_ED in zip(traces, student.memories, strict=False):
        cosines_BE = (
            torch.nn.functional.normalize(trace.x_BD, dim=1) @ torch.nn.functional.normalize(memory_ED, dim=1).T
        )
        best_BE = cosines_BE.sort(dim=1, descending=True).values
        k = model.network.top_k
        if k < best_BE.shape[1]:
            clear_B &= (best_BE[:, k - 1] - best_BE[:, k] > _NEAR).numpy()
    return logits_BC.softmax(1).numpy(), clear_B
