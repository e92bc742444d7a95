"""Students with random weights, and what they compute, row by row in numpy, from the method's formulas alone."""

from typing import Any

import numpy as np
import torch

from rbm_dist.models.student import RoutedLayer, Student
from rbm_dist.serve.artifact import empty_student


def random_student(kind: str, num_features: int = 12, num_classes: int = 5, **changes: Any) -> tuple[Student, dict]:
    """A student whose every weight is random, and the facts it is built from."""
    facts = {
        "kind": kind, "num_features": num_features, "hidden": 7, "num_classes": num_classes, "num_layers": 3,
        "norm": "layer", "num_experts": 6, "top_k": 2, "inputs": ["feat"], "routing": "layers",
        "routing_temperature": 1.0, "input_attention": False, "ensemble_size": 3,
    } | changes  # fmt: skip
    student = empty_student(**facts)
    student.inputs = tuple(facts["inputs"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in student.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.6)
        for name, buffer in student.named_buffers():
            if "var" in name:
                buffer.copy_(buffer.abs() + 0.1)
    return student.eval(), facts


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def class_probabilities(student: Student, feat: np.ndarray) -> np.ndarray:
    """`[n, C]`: dense or routed layers with layer norm and ReLU between them, one row at a time, in float64."""
    weights = {name: tensor.double().numpy() for name, tensor in student.state_dict().items()}
    rows = []
    for x in feat.astype(np.float64):
        for index, layer in enumerate(student.layers):
            if index:
                x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
                x = np.maximum(x * weights[f"norms.{index - 1}.weight"] + weights[f"norms.{index - 1}.bias"], 0)
            if not isinstance(layer, RoutedLayer):
                x = weights[f"layers.{index}.linear.weight"] @ x + weights[f"layers.{index}.linear.bias"]
                continue
            if f"layers.{index}.memory_ED" in weights:  # else the choice of the layer before stands
                memory = weights[f"layers.{index}.memory_ED"]
                cosine = memory @ x / np.linalg.norm(memory, axis=1) / max(np.linalg.norm(x), 1e-12)
                chosen = np.argsort(-cosine)[: layer.top_k]
                share = softmax(cosine[chosen] / layer.temperature)
            scale = np.exp(min(float(weights[f"layers.{index}.log_scale"]), np.log(100)))
            attention = weights.get(
                f"layers.{index}.experts.log_attention_LD", np.zeros((len(layer.experts.bias_LO), len(x)))
            )
            experts = [
                np.exp(attention[e]) * x @ weights[f"layers.{index}.experts.weight_LDO"][e]
                + weights[f"layers.{index}.experts.bias_LO"][e]
                for e in chosen
            ]
            x = scale * sum(a * y for a, y in zip(share, experts, strict=True))
        rows.append(softmax(x))
    return np.array(rows)
