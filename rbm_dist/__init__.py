"""rbm-dist: distil a graph neural network into a small, graph-free mixture of experts, on a Ray cluster."""

__version__ = "0.1.0"
