"""Which parts of the graph each worker carries: plain arithmetic, for workers that need no torch."""

from collections.abc import Sequence


def deal(num_parts: int, hosts: Sequence[str]) -> list[list[int]]:
    """The parts of each of some workers, given their hosts: as many for each, give or take one.

    A host's workers have consecutive parts. Those have most edges in common, as partitioners cut parts in two, again
    and again: between hosts half or less of the edges are cut that are if parts are dealt one by one.
    """
    bounds = [num_parts * worker // len(hosts) for worker in range(len(hosts) + 1)]
    dealt: list[list[int]] = [[] for _ in hosts]
    for place, worker in enumerate(sorted(range(len(hosts)), key=lambda worker: hosts[worker])):
        dealt[worker] = list(range(bounds[place], bounds[place + 1]))
    return dealt
