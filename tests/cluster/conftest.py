"""Beds of hosts for the tests of this folder, one per module."""

from collections.abc import Callable, Iterator

import pytest

from tests.cluster.bed import Bed
from tests.cluster.hosts import require_namespaces
from tests.cluster.submitted import Submitted, Undisturbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Three hosts (`head`, `a`, `b`) without Ray, and an object storage; tests leave them whole."""
    require_namespaces()
    pytest.importorskip("moto.server", reason="moto is not installed")
    bed = Bed(tmp_path_factory.mktemp("bed"), ["head", "a", "b"])
    yield bed
    bed.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def submit(bed: Bed) -> Iterator[Callable[..., Submitted]]:
    """Submits the small run to the bed's cluster, which is whole before; ends what is left of it."""
    bed.mend()
    submitted: list[Submitted] = []

    def start(*overrides: str, run: str | None = None) -> Submitted:
        submitted.append(Submitted(bed, *overrides, run=run))
        return submitted[-1]

    yield start
    for each in submitted:
        each.stop()
    bed.mend()
