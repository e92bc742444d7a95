"""A student at work, from an exported folder or a finished run: rows in, classes and probabilities out.

Neither Ray nor PyG nor torch is imported. The engine is `network.py` (numpy and Numba) or ONNX Runtime.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.serve import format as format_
from rbm_dist.serve.features import FeatureReader
from rbm_dist.serve.format import ModelFile

EngineName = Literal["auto", "native", "onnx"]
SCALING = ("scaling.columns", "scaling.indicators")
"""Names of the arrays that say how features are scaled, `[3, F]` float64 (fill, shift, factor) and `[i]` int64."""
Tensors = Mapping[str, np.ndarray]


class Prediction(NamedTuple):
    """Some rows' predictions; unpacks as `classes, probabilities`."""

    classes: np.ndarray  # [B] names, or int64 where the graph had no names
    probabilities: np.ndarray  # [B, C] float32


class Engine(Protocol):
    """What computes."""

    def probabilities(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """`[B, C]` float32, of inputs `[B, width]` float32 by name. Raises `InputError` for what is not finite."""
        ...

    def routings(self, inputs: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """By memory: `experts` `[B, k]`, `weights` and `cosines`."""
        ...


class LoadedStudent:
    """A student that answers. `rbm_dist.load` makes one."""

    def __init__(self, model: ModelFile, engine: Engine, digest: str):
        self.model = model
        self.digest = digest
        """Of its weights, 12 hexadecimal digits: what tells one version of a model from another."""
        self.reader = FeatureReader(model.features)
        self._engine = engine
        self._names = None if model.class_names is None else np.array(model.class_names, object)

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """None: classes are numbers."""
        return self.model.class_names

    @property
    def inputs(self) -> dict[str, int]:
        """The arrays that a row is made of, and their widths; `feat` as the user has it."""
        return self.model.inputs

    def predict(self, rows: Any, **encodings: Any) -> Prediction:
        """Classes and probabilities of some rows.

        rows: an array `[B, F]` (or of one row, `[F]`), an Arrow table, a pandas frame, or mappings of column names to
        values. encodings: `pos` and `prop`, `[B, width]`, for a student whose inputs they are. Raises `InputError`.
        """
        probability_BC = self.probabilities(self.read(rows, **encodings))
        return Prediction(self.named(probability_BC.argmax(1)), probability_BC)

    def explain(self, rows: Any, **encodings: Any) -> list[dict[str, Any]]:
        """Per row the class, its probability, and per memory the experts that it chose, with weights and cosines.

        `memories` is empty for a student without experts, an RbM that is served as an MLP included.
        """
        inputs = self.read(rows, **encodings)
        probability_BC = self.probabilities(inputs)
        routings = self._engine.routings(inputs)
        classes = self.named(probability_BC.argmax(1)).tolist()
        return [
            {
                "class": cls,
                "probability": float(probability_C.max()),
                "memories": [
                    {"layer": layer} | {name: values_Bk[row].tolist() for name, values_Bk in routing.items()}
                    for layer, routing in enumerate(routings)
                ],
            }
            for row, (cls, probability_C) in enumerate(zip(classes, probability_BC, strict=True))
        ]

    def read(self, rows: Any, **encodings: Any) -> dict[str, np.ndarray]:
        """The inputs of `probabilities` from what a user has; see `predict`."""
        inputs = {}
        if "feat" in self.inputs:
            inputs["feat"] = self._features(rows)
        for name, width in self.inputs.items():
            if name == "feat":
                continue
            if name not in encodings:
                raise InputError(
                    f"student {self.name}: learned from '{name}' besides features, `[rows, {width}]`: encodings of a "
                    f"row's place in the graph. Give {name}=…, or the edges of new nodes: rbm-dist predict --edges"
                )
            found = np.ascontiguousarray(np.atleast_2d(np.asarray(encodings[name])), np.float32)
            if found.shape[1] != width or ("feat" in inputs and len(found) != len(inputs["feat"])):
                rows_said = len(inputs["feat"]) if "feat" in inputs else "rows"
                raise InputError(f"{name}: shape [{rows_said}, {width}] expected, found {list(found.shape)}")
            inputs[name] = found
        unknown = sorted(encodings.keys() - self.inputs.keys())
        if unknown:
            raise InputError(
                f"student {self.name}: has no input '{unknown[0]}'; its inputs are {', '.join(self.inputs)}"
            )
        return inputs

    def probabilities(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probabilities `[B, C]` float32 of what `read` gives. Raises `InputError` for values that are not finite."""
        return self._engine.probabilities(inputs)

    def named(self, class_B: np.ndarray) -> np.ndarray:
        """Classes by their names, if they have any."""
        return class_B if self._names is None else self._names[class_B]

    def _features(self, rows: Any) -> np.ndarray:
        if isinstance(rows, Mapping):
            return self.reader.from_records([rows])
        if isinstance(rows, list | tuple) and rows and isinstance(rows[0], Mapping):
            return self.reader.from_records(rows)
        if hasattr(rows, "schema") and hasattr(rows, "column_names"):  # Arrow's
            return self.reader.from_table(rows)
        if hasattr(rows, "columns") and hasattr(rows, "dtypes"):  # pandas'
            import pyarrow as pa

            return self.reader.from_table(pa.Table.from_pandas(rows, preserve_index=False))
        return self.reader.from_array(rows)


class NativeEngine:
    """The compiled network on the rows as they are learned from."""

    def __init__(self, model: ModelFile, tensors: Tensors):
        from rbm_dist.serve.network import network_of

        columns, indicators = (tensors[name] for name in SCALING)
        self._fill_F, self._shift_F, self._factor_F = np.ascontiguousarray(columns, np.float64)
        self._indicators = np.ascontiguousarray(indicators, np.int64)
        self._reader, self._inputs = FeatureReader(model.features), tuple(model.inputs)
        self._missing = model.features.missing
        self._rows = ("", "sum", "length").index(model.features.rows)
        self._network = network_of(model.network.model_dump(), tensors)

    def probabilities(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Engine`."""
        from rbm_dist.serve import kernels

        logits_BC = self._network.logits(self.scaled(inputs))
        kernels.softmax(logits_BC)
        return logits_BC

    def routings(self, inputs: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """See `Engine`."""
        routings = self._network.routings(self.scaled(inputs))
        return [{"experts": each.expert_Bk, "weights": each.weight_Bk, "cosines": each.cosine_Bk} for each in routings]

    def scaled(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        from rbm_dist.serve import kernels

        found = []
        for name in self._inputs:
            rows_BF = inputs[name]
            if name == "feat":
                scaled_BG = np.empty((len(rows_BF), rows_BF.shape[1] + len(self._indicators)), np.float32)
                wrong = kernels.scale(
                    rows_BF, self._fill_F, self._shift_F, self._factor_F, self._rows, self._indicators, self._missing,
                    scaled_BG,
                )  # fmt: skip
                if wrong >= 0:
                    refuse_value(self._reader, rows_BF, wrong)
                found.append(scaled_BG)
            else:
                refuse_not_finite(name, rows_BF)
                found.append(rows_BF)
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def refuse_value(reader: FeatureReader, rows_BF: np.ndarray, place: int) -> None:
    """Raise `InputError` for the value at a place of the flattened rows."""
    row, feature = divmod(place, rows_BF.shape[1])
    names = [
        column.name if column.width == 1 and column.how != "list" else f"{column.name}[{k}]"
        for column in reader.features.columns
        for k in range(column.width)
    ]
    what = (
        "is missing or NaN, and the student was trained without missing values (source.missing)"
        if np.isnan(rows_BF[row, feature])
        else "is infinite or beyond float32"
    )
    raise InputError(f"row {row}, column {names[feature]}: the feature {what}")


def refuse_not_finite(name: str, rows_BD: np.ndarray) -> None:
    """Raise `InputError` for an encoding that is not finite."""
    if not np.isfinite(rows_BD).all():
        row, column = np.argwhere(~np.isfinite(rows_BD))[0]
        raise InputError(f"{name}: row {row}, column {column}: NaN or infinite")


def load(url: str, model: str = "rbm", engine: EngineName = "auto") -> LoadedStudent:
    """Open a student to ask it about rows.

    url: a folder that `rbm-dist export` wrote, or a finished run (then `model` says which of its students); any fsspec
    URL. engine: `native` (numpy and Numba), `onnx` (ONNX Runtime; a folder alone has the file), `auto`: native if it
    can. Raises `InputError` for what is not there, damaged or of another version.
    """
    url = storage.absolute(url)
    if not storage.exists(storage.join(url, format_.JSON)):
        from rbm_dist.serve.from_run import read_run

        facts, tensors = read_run(url, model)
        if engine == "onnx":
            raise InputError(f"{url}: a run has no ONNX file; make one: rbm-dist export {url} --out FOLDER")
        return LoadedStudent(facts, NativeEngine(facts, tensors), digest(tensors))
    facts = format_.read(url)
    if engine == "onnx" or (engine == "auto" and not _has_native()):
        from rbm_dist.serve.onnx_engine import OnnxEngine

        data = _verified(url, format_.ONNX, facts)
        return LoadedStudent(facts, OnnxEngine(facts, data), hashlib.sha256(data).hexdigest()[:12])
    tensors = read_weights(url, facts)
    return LoadedStudent(facts, NativeEngine(facts, tensors), digest(tensors))


def read_weights(url: str, facts: ModelFile) -> dict[str, np.ndarray]:
    """The arrays of an exported student. Raises `InputError` if they are damaged or of another student."""
    try:
        tensors = load_tensors(_verified(url, format_.WEIGHTS, facts))
    except SafetensorError as error:
        raise InputError(f"{storage.join(url, format_.WEIGHTS)}: not an array file: {error}") from None
    if not set(SCALING) <= tensors.keys():
        raise InputError(f"{storage.join(url, format_.WEIGHTS)}: does not say how features are scaled")
    return tensors


def digest(tensors: Tensors) -> str:
    """12 hexadecimal digits of a student's arrays."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()[:12]


def _has_native() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def _verified(url: str, name: str, facts: ModelFile) -> bytes:
    path, expected = storage.join(url, name), facts.files.get(name)
    if expected is None:
        raise InputError(f"{path}: this student has no such file")
    fs, inner = storage.filesystem(path)
    try:
        data: bytes = fs.cat_file(inner)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; export the student again") from None
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise InputError(f"{path}: damaged or of another version: its checksum is not that in {format_.JSON}")
    return data
