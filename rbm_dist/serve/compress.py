"""A smaller student from an exported one: weights in int8, fewer experts, or the one MLP that the experts average to.

Each is measured on rows with labels beside the student that it was made from, and not written if it loses too much.
Routing memories, biases and norms stay as they are: they are a hundredth of the bytes.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors
from threadpoolctl import threadpool_limits

from rbm_dist.errors import InputError, RunError
from rbm_dist.graph import quantised
from rbm_dist.serve import export
from rbm_dist.serve.format import ModelFile
from rbm_dist.serve.layers import members_of
from rbm_dist.serve.network import Network, Networks, Rows, len_of, network_of
from rbm_dist.serve.validation import Labelled

Tensors = Mapping[str, np.ndarray]
Student = tuple[ModelFile, dict[str, np.ndarray]]
BATCHES = (1, 1024)
"""Rows at once that are timed."""
_JUDGED = 16_384  # rows that say what an expert does, at most
_TIMED_S = 0.3
_INT8 = "int8"
_EXPERTS = ("experts.weight_LDO", "experts.bias_LO", "experts.log_attention_LD", "memory_ED")


def compress(out: str, student: Student, smaller: Student, labelled: Labelled, max_loss: float) -> ModelFile:
    """Measure a student and what was made of it, and write the latter as an exported student; gives its `model.json`.

    max_loss: points of accuracy on `labelled` that it may cost. Raises `RunError` if it costs more: then nothing is
    written. `compressed` of what is given has the `method`, and of both `before` and `after`: accuracy `val`, `bytes`
    of the weights, `multiply_adds` per row, and microseconds per row by rows at once, `us`.
    """
    from rbm_dist.serve.onnx_graph import build

    export.refuse_other_folder(out)
    before, after = figures(*student, labelled), figures(*smaller, labelled)
    model, tensors = smaller
    method = (model.compressed or {})["method"]
    lost = 100 * (before["val"] - after["val"])
    if lost > max_loss:
        raise RunError(
            f"{method}: {100 * after['val']:.2f} % right of {len(labelled.label_B):,} validation rows, "
            f"{100 * before['val']:.2f} % before: {lost:.2f} points lost, more than {max_loss:g} (--max-loss); nothing "
            "was written"
        )
    facts = {"method": method, "rows": len(labelled.label_B), "before": before, "after": after}
    model = model.model_copy(update={"compressed": facts, "files": {}})
    proto = build(model, tensors).SerializeToString()
    export.compare(model, in_float32(tensors), proto)
    return export.write(out, model, save_tensors(tensors), proto)


def in_int8(model: ModelFile, tensors: Tensors) -> Student:
    """Weights rounded to int8 with a scale for each of their rows, that is for each input of a layer."""
    smaller, model = dict(tensors), _with_method(model, _INT8)
    for name, weight in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "weight_LDO":
            scale = quantised.scales("int8", np.abs(weight).max(2))
            assert scale is not None
            smaller[name] = quantised.encode(weight, "int8", scale[:, :, None])
            smaller[f"{stem}.scale_LD"] = scale
        elif name.endswith("linear.weight"):  # stored as [O, D]
            scale = quantised.scales("int8", np.abs(weight).max(0))
            assert scale is not None
            smaller[name] = quantised.encode(weight, "int8", scale)
            smaller[f"{stem}.scale_D"] = scale
    return model, smaller


def in_float32(tensors: Tensors) -> dict[str, np.ndarray]:
    """Weights in int8 as the float32 that they stand for; others as they are."""
    full = {name: each for name, each in tensors.items() if not name.endswith((".scale_LD", ".scale_D"))}
    for name in tensors.keys() - full.keys():
        stem, _, last = name.rpartition(".")
        weight, axis = (f"{stem}.weight_LDO", np.s_[:, :, None]) if last == "scale_LD" else (f"{stem}.weight", np.s_[:])
        full[weight] = tensors[weight] * tensors[name][axis]
    return full


def pruned(model: ModelFile, tensors: Tensors, keep: int, rows_BD: Rows) -> Student:
    """The `keep` experts of each memory that do most: the mean over rows of weight × length of the output.

    A row whose expert is gone goes to the next nearest memory. Routed on the input, an expert is one in all layers,
    and its shares of them are added up. Raises `InputError` for a student without experts, or too few kept.
    """
    _refuse_without_experts(model, "--prune")
    network, model = model.network, _with_method(model, f"pruned to {keep} experts")
    if not network.top_k <= keep <= network.num_experts:
        raise InputError(
            f"--prune {keep}: between {network.top_k} (per row) and {network.num_experts} experts can stay"
        )
    share_LE = expert_shares(model, tensors, rows_BD)
    if network.routing == "input":
        share_LE = np.broadcast_to(share_LE.sum(0), share_LE.shape)
    smaller = dict(tensors)
    for layer, share_E in enumerate(share_LE):
        kept = np.sort(np.argsort(-share_E, kind="stable")[:keep])
        for name in (f"layers.{layer}.{part}" for part in _EXPERTS):
            if name in smaller:
                smaller[name] = smaller[name][kept]
    network = network.model_copy(update={"num_experts": keep})
    return model.model_copy(update={"network": network}), smaller


def expert_shares(model: ModelFile, tensors: Tensors, rows_BD: Rows) -> np.ndarray:
    """How much of each layer's output is each expert's, `[L, E]`: weight × length of its own output, summed over rows.

    Each layer's sum to one.
    """
    import torch

    step = -(-len_of(rows_BD) // _JUDGED)
    some = rows_BD[::step]
    x_BD = torch.from_numpy(some if isinstance(some, np.ndarray) else some.toarray())
    student = export.torch_student(model, tensors)
    shares = []
    with torch.inference_mode():
        traces = iter(student(x_BD)[1])
        for layer, row_BD in zip(student.routed_layers, student.layer_inputs(x_BD), strict=True):
            if layer.memory_ED is not None:
                routing = next(traces).routing
            assert isinstance(row_BD, torch.Tensor)
            weight_BE = torch.zeros(len(row_BD), model.network.num_experts)
            weight_BE.scatter_(1, routing.experts_Bk, routing.weights_Bk)
            lengths = [
                (row_BD @ weight_DO + bias_O).norm(dim=1)
                for weight_DO, bias_O in zip(layer.experts.scaled_weight, layer.experts.bias_LO, strict=True)
            ]
            share_E = (weight_BE * torch.stack(lengths, 1)).sum(0).double().numpy()
            shares.append(share_E / max(share_E.sum(), 1e-300))
    return np.stack(shares)


def merged(model: ModelFile, tensors: Tensors) -> Student:
    """The MLP of the mean of each layer's experts. Raises `InputError` for a student without experts."""
    from rbm_dist.models.student import rbm_to_mlp

    _refuse_without_experts(model, "--merge")
    model = _with_method(model, "experts merged")
    mlp = rbm_to_mlp(export.torch_student(model, tensors))
    smaller = {name: each.numpy() for name, each in mlp.state_dict().items()}
    smaller |= {name: each for name, each in tensors.items() if name.startswith("scaling.")}
    network = model.network.model_copy(update={"kind": "mlp"})
    return model.model_copy(update={"network": network}), smaller


def figures(model: ModelFile, tensors: Tensors, labelled: Labelled) -> dict[str, Any]:
    """Accuracy, size and speed of a student; see `compress`. One thread."""
    facts = model.network.model_dump()
    with threadpool_limits(1):
        return {
            "val": labelled.accuracy(network_of(facts, tensors, few=1)),
            "bytes": len(save_tensors(dict(tensors))),
            "multiply_adds": sum(layer.multiply_adds for layers in members_of(facts, tensors) for layer in layers),
            "us": {str(batch): _microseconds(network_of(facts, tensors), labelled.rows_BD, batch) for batch in BATCHES},
        }


def _microseconds(network: Network | Networks, rows_BD: Rows, batch: int) -> float:
    """Median time per row, of dense rows, as a caller has them."""
    draw = np.random.default_rng(0)
    # Many different rows: the weights of one row's experts alone would stay in the nearest cache.
    drawn = [rows_BD[draw.integers(0, len_of(rows_BD), batch)] for _ in range(max(8, BATCHES[-1] // batch))]
    batches = [each if isinstance(each, np.ndarray) else each.toarray() for each in drawn]
    times: list[float] = []
    network.logits(batches[0])
    end = time.perf_counter() + _TIMED_S
    while len(times) < len(batches) or time.perf_counter() < end:
        start = time.perf_counter()
        network.logits(batches[len(times) % len(batches)])
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / batch * 1e6


def _with_method(model: ModelFile, method: str) -> ModelFile:
    """The facts of a student that this was done to, after what was done before."""
    before = (model.compressed or {}).get("method")
    if before and before.endswith(_INT8):
        raise InputError(f"student {model.name}: is in int8 already; compress the one that it was made from")
    return model.model_copy(update={"compressed": {"method": f"{before}, {method}" if before else method}})


def _refuse_without_experts(model: ModelFile, option: str) -> None:
    if model.network.kind != "rbm":
        raise InputError(f"student {model.name}: is no RbM with experts ({model.network.kind}); {option} is for these")
