"""Storage that fails for a while is waited for; for good, it is one message, and nothing half is believed."""

import pickle
import time

import fsspec
import numpy as np
import pytest
from pyarrow.fs import FileSelector, FileType, FSSpecHandler, PyFileSystem

from rbm_dist import storage
from rbm_dist.errors import InputError, RunError
from tests.patience import patient
from tests.storage.proxy import BUSY, CLOSE, CUT, REFUSE, STALL, FaultyProxy

FAULTS = [REFUSE, CLOSE, STALL, CUT, BUSY]
CONTENT = np.random.default_rng(0).bytes(300_000)


DEADLINE = "RBM_DIST_STORAGE_TIMEOUT_S"


@pytest.fixture(autouse=True)
def deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a stalled read takes an eighth, and a stalled write the half."""
    monkeypatch.setenv(DEADLINE, str(patient(3)))


@pytest.fixture
def array(network: FaultyProxy, s3_url: str) -> tuple[str, storage.FileInfo]:
    url = f"{s3_url}/a.npy"
    return url, storage.write_array(url, np.frombuffer(CONTENT, np.uint8))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("open_", [storage.open_array, storage.open_rows])
def test_a_read_that_fails_is_done_again(
    network: FaultyProxy, array: tuple[str, storage.FileInfo], fault: str, open_
) -> None:  # type: ignore[no-untyped-def]
    network.matching, network.faults = "^GET", [fault, fault]
    assert open_(*array)[:].tobytes() == CONTENT
    assert not network.faults, "both came to pass"


@pytest.mark.parametrize("fault", [REFUSE, STALL, CUT])
def test_a_read_that_never_succeeds_is_one_message(
    network: FaultyProxy, array: tuple[str, storage.FileInfo], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.matching, network.always = "^GET", fault
    before = len(network.requests)
    with monkeypatch.context() as patch:
        patch.setenv(DEADLINE, str(patient(1)))
        with pytest.raises(
            RunError, match=rf"^{array[0]}: cannot be read: .+ \(tried \d+ times, for [\d.]+ s: "
        ) as caught:
            storage.open_array(*array)
    assert caught.value.__cause__ is None
    assert len(network.requests) - before > 1
    network.always = None
    assert storage.open_array(*array)[:].tobytes() == CONTENT, "nothing half was kept"


@pytest.mark.parametrize("fault", [REFUSE, CLOSE, STALL, BUSY])
@pytest.mark.parametrize("size", [1000, 20 << 20])  # one request; several
def test_a_write_that_fails_is_done_again(network: FaultyProxy, s3_url: str, fault: str, size: int) -> None:
    content = CONTENT * (size // len(CONTENT) + 1)
    network.matching, network.faults = "^(PUT|POST)", [fault]
    with storage.atomic_writer(f"{s3_url}/a") as stream:
        stream.write(content)
    assert not network.faults
    assert storage.file_info(f"{s3_url}/a") == stream.info


@pytest.mark.parametrize("fault", [REFUSE, STALL, BUSY])
def test_a_write_that_never_succeeds_leaves_what_was_there(
    network: FaultyProxy, s3_url: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_json(f"{s3_url}/a.json", "old")
    network.matching, network.always = "^(PUT|POST)", fault
    with monkeypatch.context() as patch:
        patch.setenv(DEADLINE, str(patient(0.5)))
        with pytest.raises(RunError, match=rf"^{s3_url}/a\.json: cannot be written: .+ See to it that the storage "):
            storage.write_json(f"{s3_url}/a.json", "new")
    network.always = None
    assert storage.read_json(f"{s3_url}/a.json") == "old"


def test_listings_and_deletions_are_done_again_too(network: FaultyProxy, s3_url: str) -> None:
    storage.write_json(f"{s3_url}/a/b.json", 1)
    for act, expected in ((storage.listdir, ["a"]), (storage.exists, True), (storage.remove, None)):
        network.faults = [REFUSE, BUSY, CLOSE]
        assert act(s3_url) == expected
        assert not network.faults
    assert storage.listdir(s3_url) == []


def test_streams_of_readers_are_mended_too(network: FaultyProxy, s3_url: str) -> None:
    with storage.atomic_writer(f"{s3_url}/a.txt") as stream:
        stream.write(CONTENT)
    fs, path = storage.filesystem(f"{s3_url}/a.txt")
    with fs.open(path, "rb", block_size=100_000) as reader:
        network.matching, network.faults = "^GET", [CUT, CLOSE]
        assert reader.read() == CONTENT
    assert not network.faults


def test_what_is_not_there_or_not_allowed_is_said_at_once(network: FaultyProxy, s3_url: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"b\.json: no such file"):
        storage.read_json(f"{s3_url}/b.json")
    with pytest.raises(InputError, match=r"cannot be written: .*bucket does not exist"):
        storage.write_json("s3://no-such-bucket/a.json", 1)
    assert len(network.requests) <= 4, f"asked once, not for {time.monotonic() - start} s"


def test_missing_credentials_are_an_input_error(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, f"{tmp_path}/none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(InputError, match=r"cannot use this storage: .*credentials"):
        storage.read_json("s3://bucket/a.json")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_deadline_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBM_DIST_STORAGE_TIMEOUT_S", "soon")
    with pytest.raises(InputError, match="RBM_DIST_STORAGE_TIMEOUT_S: seconds expected, found 'soon'"):
        storage.read_json("s3://bucket/a.json")


def test_it_is_what_arrow_and_ray_write_through(s3_url: str) -> None:
    """Also after it was sent to another process."""
    handler = FSSpecHandler(pickle.loads(pickle.dumps(storage.filesystem(s3_url)[0])))
    fs, folder = PyFileSystem(handler), s3_url.removeprefix("s3://")
    fs.create_dir(f"{folder}/a")
    with fs.open_output_stream(f"{folder}/a/b") as stream:
        stream.write(CONTENT)
    with fs.open_input_stream(f"{folder}/a/b") as stream:
        assert stream.read() == CONTENT
    fs.copy_file(f"{folder}/a/b", f"{folder}/a/c")
    found = fs.get_file_info(FileSelector(f"{folder}/a"))
    assert sorted((each.base_name, each.size, each.type) for each in found) == [
        ("b", len(CONTENT), FileType.File), ("c", len(CONTENT), FileType.File),
    ]  # fmt: skip
    fs.delete_dir(f"{folder}/a")
    assert fs.get_file_info(f"{folder}/a").type == FileType.NotFound
