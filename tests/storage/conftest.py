"""An S3 server behind a network that can be made to fail."""

from collections.abc import Iterator

import pytest

from tests.storage.proxy import FaultyProxy, faulty_proxy


@pytest.fixture
def network(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What lies between `s3_url` and its server."""
    import s3fs

    with faulty_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
