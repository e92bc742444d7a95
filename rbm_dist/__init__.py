"""rbm-dist: distil a graph neural network into a small, graph-free mixture of experts, on a Ray cluster."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from rbm_dist.serve.loaded import load


def __getattr__(name: str) -> Any:
    # Late, so that what only wants the version or a command does not wait for arrays and weights.
    if name == "load":
        from rbm_dist.serve.loaded import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
