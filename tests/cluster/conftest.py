"""Beds of hosts for the tests of this folder, one per module."""

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Bed, require_namespaces


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Three hosts (`head`, `a`, `b`) without Ray, and an object storage; tests leave them whole."""
    require_namespaces()
    pytest.importorskip("moto.server", reason="moto is not installed")
    bed = Bed(tmp_path_factory.mktemp("bed"), ["head", "a", "b"])
    yield bed
    bed.close()
