"""A trained student made ready to answer: the network that a served one is, without torch (`network.py`)."""

from typing import Any

from rbm_dist.models.student import Ensemble, GatedLayer, RoutedLayer, Student
from rbm_dist.serve.network import Network, Networks, network_of


def freeze(student: Student, few: int | None = None) -> Network | Networks:
    """A student for inference alone, with the same logits up to rounding.

    few: up to how many rows go one by one through it; None: measured, so that which way a row goes, and with it how it
    is rounded, depends on the machine.
    """
    members = student.members if isinstance(student, Ensemble) else [student]
    plain = next(each for each in members if isinstance(each, Student))
    first = plain.layers[0]
    facts: dict[str, Any] = {"kind": "mlp", "num_layers": len(plain.layers)}
    if isinstance(first, RoutedLayer):
        facts |= {"kind": "rbm", "top_k": first.top_k, "routing_temperature": first.temperature}
    elif isinstance(first, GatedLayer):
        facts |= {"kind": "moe", "top_k": first.top_k}
    if isinstance(student, Ensemble):
        facts |= {"kind": "ensemble", "ensemble_size": len(members)}
    return network_of(facts, {name: each.detach().cpu().numpy() for name, each in student.state_dict().items()}, few)
