"""The Open Inference Protocol, version 2 (KServe, Triton), of one model: bytes to arrays, and arrays to bytes.

With its extension for binary tensors, which clients such as tritonclient use by default. What the protocol leaves open
is strict here: one type per tensor, and `[rows, width]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orjson

from rbm_dist.errors import InputError
from rbm_dist.serve.loaded import LoadedStudent

HEADER_LENGTH = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
_FLOAT = np.dtype("<f4")
_NUMBERS = {int, float}


class TooManyRowsError(InputError):
    """More rows than one request may have."""


class Inference(NamedTuple):
    """A request, understood."""

    id: str | None
    inputs: dict[str, np.ndarray]  # [B, width] float32
    outputs: list[tuple[str, bool]]  # name, and whether it is wanted as binary data


def metadata(student: LoadedStudent, name: str) -> dict[str, Any]:
    """What the protocol says of a model: its inputs and outputs."""
    outputs = [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, student.model.num_classes]},
        {"name": "class", "datatype": "INT64", "shape": [-1]},
    ]
    if student.class_names is not None:
        outputs.append({"name": "class_name", "datatype": "BYTES", "shape": [-1]})
    inputs = [{"name": name, "datatype": "FP32", "shape": [-1, width]} for name, width in student.inputs.items()]
    return {"name": name, "versions": [student.digest], "platform": "rbm-dist", "inputs": inputs, "outputs": outputs}


def parse_json(data: bytes | memoryview) -> Any:
    """JSON as the standard has it: no NaN, no endless nesting. Raises `InputError`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InputError(f"not valid JSON: {error}") from None


def parse(body: bytes, header_length: str | None, student: LoadedStudent, max_rows: int) -> Inference:
    """Read a request. `header_length`: that of its JSON, where binary data follows. Raises `InputError`."""
    end = _header_end(body, header_length)
    request = parse_json(memoryview(body)[:end])
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
        raise InputError('an object with "inputs", a list of tensors, expected')
    id_ = request.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise InputError(f'"id": a string expected, found {_kind(id_)}')
    inputs: dict[str, np.ndarray] = {}
    for tensor in request["inputs"]:
        name = _name(tensor, "inputs")
        if name not in student.inputs or name in inputs:
            raise InputError(f"input '{name[:80]}': {_twice_or_unknown(name in inputs, list(student.inputs))}")
        inputs[name], end = _tensor(tensor, name, student.inputs[name], body, end, max_rows)
    missing = [name for name in student.inputs if name not in inputs]
    if missing:
        raise InputError(f"input '{missing[0]}' is missing; the model's inputs are {', '.join(student.inputs)}")
    if len({len(rows) for rows in inputs.values()}) > 1:
        found = ", ".join(f"{name} {len(rows)}" for name, rows in inputs.items())
        raise InputError(f"inputs differ in their number of rows: {found}")
    if end != len(body):
        raise InputError(f"{len(body) - end:,} bytes follow the last tensor that the JSON speaks of")
    return Inference(id_, inputs, _outputs(request, student))


def answer(
    inference: Inference, name: str, student: LoadedStudent, probability_BC: np.ndarray
) -> tuple[bytes, int | None]:
    """The bytes of an answer, and the length of its JSON where binary data follows it."""
    class_B = probability_BC.argmax(1)
    values: dict[str, Callable[[], Any]] = {
        "probabilities": lambda: probability_BC,
        "class": lambda: class_B,
        "class_name": lambda: student.named(class_B),
    }
    outputs, binary = [], []
    for output, as_binary in inference.outputs:
        value = values[output]()
        tensor = {"name": output, "shape": value.shape, "datatype": _DATATYPES[output]}
        if as_binary:
            data = _strings(value) if output == "class_name" else value.tobytes()
            tensor["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            tensor["data"] = value.tolist() if output == "class_name" else value.reshape(-1)
        outputs.append(tensor)
    said = {"model_name": name, "model_version": student.digest, "outputs": outputs}
    if inference.id is not None:
        said["id"] = inference.id
    head = orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([head, *binary]), len(head)) if binary else (head, None)


_DATATYPES = {"probabilities": "FP32", "class": "INT64", "class_name": "BYTES"}


def matrix(data: Any, shape: tuple[int, int], what: str) -> np.ndarray:
    """Numbers as JSON has them, flat or as a list of rows, as `[rows, width]` float32. Raises `InputError`."""
    rows, width = shape
    if not isinstance(data, list):
        raise InputError(f"{what}: a list of numbers expected, found {_kind(data)}")
    if data and isinstance(data[0], list):
        for row, values in enumerate(data):
            if not isinstance(values, list) or len(values) != width:
                found = f"{len(values)}" if isinstance(values, list) else _kind(values)
                raise InputError(f"{what}: row {row}: a list of {width} numbers expected, found {found}")
        if len(data) != rows:
            raise InputError(f"{what}: {rows} rows expected, found {len(data)}")
        data = [value for values in data for value in values]
    if len(data) != rows * width:
        raise InputError(f"{what}: {rows} × {width} = {rows * width} numbers expected, found {len(data)}")
    others = {*map(type, data)} - _NUMBERS  # truth values are no numbers here, though numpy would take them
    if others:
        place = next(place for place, value in enumerate(data) if type(value) in others)
        raise InputError(f"{what}: row {place // width}: a number expected, found {_kind(data[place])}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused where rows are scaled
        return np.array(data, np.float64).astype(np.float32).reshape(rows, width)


def _header_end(body: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 20):
        raise InputError("Inference-Header-Content-Length: a number of bytes expected")
    if int(header_length) > len(body):
        raise InputError(f"Inference-Header-Content-Length: {header_length}, but the body has {len(body):,} bytes")
    return int(header_length)


def _tensor(
    tensor: dict[str, Any], name: str, width: int, body: bytes, at: int, max_rows: int
) -> tuple[np.ndarray, int]:
    """One input, and where the next one's binary data begins."""
    what = f"input '{name}'"
    if tensor.get("datatype") != "FP32":
        raise InputError(f"{what}: datatype FP32 expected, found {_shown(tensor.get('datatype'))}")
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list) or len(shape) != 2 or any(type(length) is not int for length in shape)
        or shape[0] < 1 or shape[1] != width
    ):  # fmt: skip
        raise InputError(f"{what}: shape [rows, {width}] with at least one row expected, found {_shown(shape)}")
    if shape[0] > max_rows:
        raise TooManyRowsError(f"{what}: {shape[0]:,} rows; one request may have {max_rows:,} (--max-rows)")
    size = _parameters(tensor, what).get("binary_data_size")
    if size is None:
        return matrix(tensor.get("data"), (shape[0], width), what), at
    if "data" in tensor:
        raise InputError(f'{what}: has both "data" and binary_data_size')
    expected = shape[0] * width * _FLOAT.itemsize
    if type(size) is not int or size != expected:
        raise InputError(f"{what}: binary_data_size {expected} expected for its shape, found {_shown(size)}")
    if at + size > len(body):
        raise InputError(f"{what}: {size:,} bytes of data expected, the body has {len(body) - at:,} left")
    # A copy: the bytes lie at any address and may not be written to; for either the engine would compile itself anew.
    return np.frombuffer(body, _FLOAT, shape[0] * width, at).reshape(shape).astype(np.float32), at + size


def _outputs(request: dict[str, Any], student: LoadedStudent) -> list[tuple[str, bool]]:
    known = ["probabilities", "class"] + ["class_name"] * (student.class_names is not None)
    by_default = _flag(_parameters(request, "the request"), "binary_data_output", False)
    wanted = request.get("outputs")
    if wanted is None or wanted == []:
        return [(name, by_default) for name in known]
    if not isinstance(wanted, list):
        raise InputError(f'"outputs": a list expected, found {_kind(wanted)}')
    found: list[tuple[str, bool]] = []
    for output in wanted:
        name = _name(output, "outputs")
        asked_before = name in [each for each, _ in found]
        if name not in known or asked_before:
            raise InputError(f"output '{name[:80]}': {_twice_or_unknown(asked_before, known)}")
        parameters = _parameters(output, f"output '{name}'")
        if "classification" in parameters:
            raise InputError(f"output '{name}': classification is not supported; ask for class, or use /predict")
        found.append((name, _flag(parameters, "binary_data", by_default)))
    return found


def _name(tensor: Any, where: str) -> str:
    name = tensor.get("name") if isinstance(tensor, dict) else None
    if not isinstance(name, str):
        raise InputError(f'"{where}": each is an object with a "name"')
    return name


def _parameters(of: dict[str, Any], what: str) -> dict[str, Any]:
    found = of.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f'{what}: "parameters" is an object, found {_kind(found)}')
    return found


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise InputError(f"parameter {name}: true or false expected, found {_kind(found)}")
    return found


def _strings(names_B: np.ndarray) -> bytes:
    """Each as the length of its UTF-8, four bytes, and these."""
    encoded = [name.encode() for name in names_B]
    return b"".join(part for name in encoded for part in (len(name).to_bytes(4, "little"), name))


def _twice_or_unknown(twice: bool, known: list[str]) -> str:
    return "is there twice" if twice else f"unknown; the model has {', '.join(known)}"


def _kind(value: Any) -> str:
    """A JSON value in words, without its content."""
    if value is None:
        return "nothing"
    return {bool: "true or false", str: "text", dict: "an object", list: "a list"}.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str | int | float | list) else _kind(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
