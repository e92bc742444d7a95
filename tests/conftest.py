"""Fixtures for all tests: real graphs, an S3 server in this process, a disk of one megabyte."""

import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.patience import patient
from tests.storage.proxy import FaultyProxy, faulty_proxy

# Ray's workers are nice by default, and get a thirtieth of a core that any other process wants, too.
os.environ.setdefault("RAY_worker_niceness", "0")
_THERE = (
    "dry_run",
    "encodings",
    "evaluate",
    "exported_run",
    "inspect",
    "kill",
    "pipeline",
    "predict",
    "report",
    "served_run",
)
FINISHED_RUN = [f"tests/stages/test_{name}.py" for name in _THERE]

pytest.register_assert_rewrite("tests.graph.reference", "tests.cluster.submitted")
settings.register_profile("rbm-dist", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("rbm-dist")


class ByFile(LoadScopeScheduling):
    """Tests of one file share a process, and so do the files that share the finished run of tests/stages."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "finished run" if file in FINISHED_RUN else file


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.timeout is None:  # not given on the command line
        config.option.timeout = patient(300)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of stages are the slowest, and go first."""
    items.sort(key=lambda item: "stages" not in item.path.parts)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real graphs, from RBM_DIST_DATA or beside the repository; skips where there is none."""
    folder = Path(os.environ.get("RBM_DIST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cora.npz").is_file():
        pytest.skip(f"no real graphs in {folder}; set RBM_DIST_DATA to the folder of cora.npz and the others")
    return folder


@pytest.fixture
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder and a cache in it of this test's own, so that what is fetched is gone afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("RBM_DIST_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server in this process, with a bucket named `bucket`."""
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield environment["AWS_ENDPOINT_URL"]
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, local_cache: Path) -> str:
    """An empty folder on S3."""
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def network(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What lies between `s3_url` and its server: it counts bytes, and can be made to fail."""
    import s3fs

    with faulty_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory_url(local_cache: Path) -> str:
    """An empty folder on fsspec's in-memory file system."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on each kind of storage in turn."""
    return str(tmp_path / "folder") if request.param == "local" else request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where this user may not mount one."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk that is small enough to fill")
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
