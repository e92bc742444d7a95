"""A GPU that is not there: tensors with shapes, types and a device, but no numbers, on a machine without a GPU.

What runs on it mixes no devices and no types, and asks for no number: that raises at once, and so does moving a tensor
to CPU memory. torch has no CUDA here, so the device is one of Python's own that autograd knows how to go through.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = "pretend"
_libraries: list[torch.library.Library] = []  # what is registered ends with these


def on_fake_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has such a device, with its tensors."""
    return _process().submit(_call, function, arguments).result()


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), _set_up)


def on(module: nn.Module, device: torch.device) -> nn.Module:
    """A module moved to the device, which for tensors without numbers `Module.to` cannot do."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                )
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module


def _set_up() -> None:
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(GPU, backend_module=Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm"):  # what CUDA's autocast computes in less precision, of what is used here
        aten.impl(name, partial(_in_bf16, getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    _libraries.extend([everything, aten])


def _in_bf16(operator: Callable[..., Any], *arguments: Any) -> Any:
    with torch.autocast(GPU, enabled=False):
        return operator(*(each.bfloat16() if isinstance(each, torch.Tensor) else each for each in arguments))


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with FakeTensorMode(), _NothingComesBack():
        try:
            return function(torch.device(GPU, 0), *arguments)
        except Exception as error:  # torch's own have parts that do not leave a process
            raise AssertionError("".join(traceback.format_exception(error))) from None


class _NothingComesBack(TorchDispatchMode):
    """Refuses to copy from the GPU into CPU memory: the step would wait for all that is under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if copies and source.device.type == GPU and out.device.type == "cpu":
            raise AssertionError(f"{func}: copied from the GPU into CPU memory")
        return out
