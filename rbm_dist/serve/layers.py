"""The layers of a trained student as they are computed, from its weights by the names of `models/student.py`.

Scales are multiplied in, memories have length one, batch norms are affine maps: what depends on no input is done here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbm_dist.serve import kernels

Facts = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]
_MAX_SCALE = math.log(100)  # of exp(t), exp(c) and the vanilla mixture's temperature


@dataclass(frozen=True)
class Layer:
    """A layer as it is computed: experts (one: a plain layer), who chooses among them, and the norm behind."""

    weight_EDO: np.ndarray  # int8 if they have scales
    bias_EO: np.ndarray
    keys_PE: np.ndarray | None  # what a row is compared with; None: it goes where it went in the layer before
    projection_DP: np.ndarray | None  # before it is compared
    top_k: int
    over_all: bool  # whether weights are a softmax over all experts, or over the chosen
    norm: int
    gain_2O: np.ndarray  # gain and offset of the norm behind it
    temperature: float = 1.0  # that scores were divided by: times it they are cosines
    scale_ED: np.ndarray | None = None  # what each row of the experts' weights is to be multiplied by

    def in_full(self, expert: int) -> np.ndarray:
        """`[D, O]`, those of one expert."""
        if self.scale_ED is None:
            return self.weight_EDO[expert]
        full_DO = np.empty(self.weight_EDO.shape[1:], self.scale_ED.dtype)
        kernels.in_full(self.weight_EDO[expert], self.scale_ED[expert], full_DO)
        return full_DO

    @property
    def multiply_adds(self) -> int:
        """Of the matrix products of one row, routing included."""
        experts, width, outputs = self.weight_EDO.shape
        routing = 0 if self.keys_PE is None else self.keys_PE.size
        routing += 0 if self.projection_DP is None else self.projection_DP.size
        return routing + min(self.top_k, experts) * width * outputs


def members_of(network: Facts, tensors: Tensors) -> list[list[Layer]]:
    """The layers of a student, or of each member of an ensemble; by the names of `models/student.py`."""
    if network["kind"] != "ensemble":
        make = {"mlp": _dense, "rbm": _routed, "moe": _gated}[network["kind"]]
        return [[make(network, tensors, layer) for layer in range(network["num_layers"])]]
    found = []
    for member in range(network["ensemble_size"]):
        prefix = f"members.{member}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        found += members_of({**network, "kind": "mlp"}, own)
    return found


def _dense(network: Facts, tensors: Tensors, layer: int) -> Layer:
    weight_OD, bias_O = tensors[f"layers.{layer}.linear.weight"], tensors[f"layers.{layer}.linear.bias"]
    scale_D = tensors.get(f"layers.{layer}.linear.scale_D")
    return Layer(
        weight_OD.T[None], bias_O[None], None, None, 1, False, *_norm(tensors, layer, len(bias_O)),
        scale_ED=None if scale_D is None else scale_D[None],
    )  # fmt: skip


def _routed(network: Facts, tensors: Tensors, layer: int) -> Layer:
    at = f"layers.{layer}"
    scale = np.exp(np.minimum(tensors[f"{at}.log_scale"], _MAX_SCALE))
    weight_EDO, bias_EO, scale_ED = _experts(tensors, at, scale)
    memory_ED = tensors.get(f"{at}.memory_ED")
    temperature = network["routing_temperature"]
    keys = None if memory_ED is None else _unit(memory_ED).T / temperature
    norm = _norm(tensors, layer, bias_EO.shape[1])
    return Layer(weight_EDO, bias_EO * scale, keys, None, network["top_k"], False, *norm, temperature, scale_ED)


def _gated(network: Facts, tensors: Tensors, layer: int) -> Layer:
    at = f"layers.{layer}"
    weight_EDO, bias_EO, scale_ED = _experts(tensors, at)
    inverse = np.exp(np.minimum(tensors[f"{at}.log_inverse_temperature"], _MAX_SCALE))
    keys = _unit(tensors[f"{at}.gate_EP"]).T * inverse
    norm = _norm(tensors, layer, bias_EO.shape[1])
    projection_DP = tensors[f"{at}.projection_DP"]
    temperature = float(1 / inverse)
    return Layer(weight_EDO, bias_EO, keys, projection_DP, network["top_k"], True, *norm, temperature, scale_ED)


def _experts(tensors: Tensors, at: str, factor: Any = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Weights times `factor` and input attention, biases as they are, and the scales of weights in int8."""
    weight_EDO, bias_EO = tensors[f"{at}.experts.weight_LDO"], tensors[f"{at}.experts.bias_LO"]
    scale_ED = tensors.get(f"{at}.experts.scale_LD")
    attention_ED = tensors.get(f"{at}.experts.log_attention_LD")
    if attention_ED is not None:
        factor = factor * np.exp(np.minimum(attention_ED, _MAX_SCALE))
    if scale_ED is not None:
        return weight_EDO, bias_EO, scale_ED * factor
    return weight_EDO * (factor if attention_ED is None else factor[:, :, None]), bias_EO, None


def _unit(rows_EP: np.ndarray) -> np.ndarray:
    return rows_EP / np.maximum(np.linalg.norm(rows_EP, axis=1, keepdims=True), 1e-12)


def _norm(tensors: Tensors, layer: int, outputs: int) -> tuple[int, np.ndarray]:
    """The norm behind a layer as its kind and `[2, O]` gain and offset."""
    weight = tensors.get(f"norms.{layer}.weight")
    if weight is None:
        return kernels.NO_NORM, np.zeros((2, outputs))
    bias, mean = tensors[f"norms.{layer}.bias"], tensors.get(f"norms.{layer}.running_mean")
    if mean is None:
        return kernels.LAYER_NORM, np.stack([weight, bias])
    gain = weight / np.sqrt(tensors[f"norms.{layer}.running_var"] + 1e-5)
    return kernels.AFFINE, np.stack([gain, bias - mean * gain])
