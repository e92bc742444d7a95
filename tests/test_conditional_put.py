"""Conditional writes on S3 (moto keeps to them) and on what Google documents of its JSON API, in a small server."""

import email.utils
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from rbm_dist import conditional_put
from rbm_dist.conditional_put import RefusedError


class GoogleStorage(BaseHTTPRequestHandler):
    """Metadata, media and simple uploads with `ifGenerationMatch`, as the JSON API's reference describes them."""

    objects: dict[str, tuple[int, float, bytes]] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        name = unquote(url.path.rsplit("/o/", 1)[1])
        generation, updated, data = self.objects.get(name, (0, 0.0, b""))
        if not generation or query.get("generation", [str(generation)]) != [str(generation)]:
            self.answer(404, b'{"error": {"code": 404, "message": "No such object"}}')
        elif query.get("alt") == ["media"]:
            self.answer(200, data)
        else:
            stamp = datetime.fromtimestamp(updated, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self.answer(200, json.dumps({"generation": str(generation), "updated": stamp}).encode())

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        assert (url.path, query["uploadType"]) == ("/upload/storage/v1/b/bucket/o", ["media"])
        (name,), (wanted,) = query["name"], query["ifGenerationMatch"]
        data = self.rfile.read(int(self.headers["Content-Length"]))
        generation = self.objects.get(name, (0, 0.0, b""))[0]
        if int(wanted) != generation:
            self.answer(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
            return
        self.objects[name] = (generation + 7, time.time() - 100, data)
        self.answer(200, json.dumps({"generation": str(generation + 7)}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Date", email.utils.formatdate(usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def gs_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), GoogleStorage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "gs://bucket/run"
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_write_needs_the_version_that_was_read(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{kind}_url") + "/a file.json"
    assert conditional_put.is_possible(url)
    assert conditional_put.read(url) is None
    with pytest.raises(RefusedError):
        conditional_put.put(url, b"0", "123")
    first = conditional_put.put(url, b"1", None)
    with pytest.raises(RefusedError):
        conditional_put.put(url, b"2", None)
    second = conditional_put.put(url, b"2", first)
    with pytest.raises(RefusedError):
        conditional_put.put(url, b"3", first)
    found = conditional_put.read(url)
    assert found is not None
    assert (found.data, found.version) == (b"2", second)
    age_s = {"s3": 0, "gs": 100}[kind]
    assert age_s - 1 <= found.age_s <= age_s + 60
    assert conditional_put.is_kept(url, b"2")


def test_other_storage_knows_no_conditions(memory_url: str, tmp_path: object) -> None:
    assert not conditional_put.is_possible(memory_url)
    assert not conditional_put.is_possible(str(tmp_path))
