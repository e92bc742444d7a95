"""The engine of a student's ONNX file: ONNX Runtime and numpy, nothing else."""

from collections.abc import Mapping

import numpy as np
import onnxruntime

from rbm_dist.errors import InputError
from rbm_dist.serve.features import FeatureReader
from rbm_dist.serve.format import ModelFile
from rbm_dist.serve.loaded import refuse_not_finite, refuse_value

_PROBABILITIES = "probabilities"


class OnnxEngine:
    """See `loaded.Engine`. On one thread: a server runs several requests side by side."""

    def __init__(self, model: ModelFile, data: bytes):
        """data: the ONNX file. Raises `InputError` if it is not that of this student."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own kinds, which have no public base
            raise InputError(f"model.onnx: ONNX Runtime cannot read it: {' '.join(str(error).split())[:300]}") from None
        found = {each.name for each in self._session.get_inputs()}
        if found != set(model.inputs):
            raise InputError(f"model.onnx: its inputs are {', '.join(sorted(found))}, not {', '.join(model.inputs)}")
        self._reader, self._missing = FeatureReader(model.features), model.features.missing
        routers = sum(each.name.startswith("experts_") for each in self._session.get_outputs())
        self._routings = [
            {what: f"{what}_{index}" for what in ("experts", "weights", "cosines")} for index in range(routers)
        ]

    def probabilities(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Engine`."""
        self._check(inputs)
        found: np.ndarray = self._session.run([_PROBABILITIES], dict(inputs))[0]
        return found

    def routings(self, inputs: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """See `Engine`."""
        self._check(inputs)
        found = []
        for names in self._routings:
            found.append(dict(zip(names, self._session.run(list(names.values()), dict(inputs)), strict=True)))
        return found

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        for name, rows_BF in inputs.items():
            if name != "feat":
                refuse_not_finite(name, rows_BF)
                continue
            wrong_BF = np.isinf(rows_BF) if self._missing else ~np.isfinite(rows_BF)
            if wrong_BF.any():
                refuse_value(self._reader, rows_BF, int(wrong_BF.argmax()))
