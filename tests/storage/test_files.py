"""Storage: a file is whole or not there, damage is found, and all kinds of storage behave alike."""

import errno
import gc
import hashlib
import json
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from rbm_dist import storage
from rbm_dist.errors import InputError
from tests.pickle_trap import Trap

ARRAYS = nps.arrays(
    dtype=st.sampled_from(["int8", "int32", "int64", "float32", "float64", "bool"]).map(np.dtype),
    shape=nps.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
)


def names(url: str) -> list[str]:
    """Every file below a folder, whatever its name."""
    fs, path = storage.filesystem(url)
    return sorted(name[len(path) :].lstrip("/") for name in fs.find(path))


def write_half(url: str, content: bytes, error: BaseException) -> None:
    with storage.atomic_writer(url) as stream:
        stream.write(content)
        raise error


def test_a_file_is_there_with_its_size_and_checksum(url: str) -> None:
    target = f"{url}/deep/below/a.bin"
    with storage.atomic_writer(target) as stream:
        stream.write(b"abc")
        stream.write(np.arange(3, dtype=np.uint8))
        assert not storage.exists(target)
    content = b"abc\x00\x01\x02"
    assert storage.filesystem(target)[0].cat_file(storage.filesystem(target)[1]) == content
    assert stream.info == {"bytes": 6, "sha256": hashlib.sha256(content).hexdigest()}
    assert storage.file_info(target) == stream.info
    assert names(url) == ["deep/below/a.bin"]


@pytest.mark.parametrize("size", [0, 10, 1 << 16])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_file_whose_block_raises(url: str, size: int, error: type[BaseException]) -> None:
    with pytest.raises(error, match="half way"):
        write_half(f"{url}/a.bin", bytes(size), error("half way"))
    gc.collect()
    assert names(url) == []


def test_the_old_file_stays_if_the_new_one_fails(url: str) -> None:
    storage.write_json(f"{url}/a.json", "old")
    with pytest.raises(RuntimeError):
        write_half(f"{url}/a.json", b'"new"', RuntimeError())
    assert storage.read_json(f"{url}/a.json") == "old"
    storage.write_json(f"{url}/a.json", "new")
    assert storage.read_json(f"{url}/a.json") == "new"
    assert names(url) == ["a.json"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [10, 60 << 20])  # less than a block; so much that some of it is sent before the end
def test_an_abandoned_upload_costs_nothing(s3_url: str, size: int) -> None:
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    with pytest.raises(RuntimeError):
        write_half(f"{s3_url}/large.bin", bytes(size), RuntimeError())
    gc.collect()
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="bucket")
    assert names(s3_url) == []


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/a.json", "old")
    with open(tmp_path / "a.json") as reader:
        storage.write_json(f"{tmp_path}/a.json", "new")
        assert reader.read() == '"old"\n'


@pytest.mark.parametrize("kind", ["a file as folder", "a folder as file"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "a file as folder":
        (tmp_path / "a").write_text("file")
        target = tmp_path / "a" / "b.json"
    else:
        target = tmp_path / "folder"
        (target / "inner").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{target}: cannot be written: "):
        storage.write_json(str(target), 1)
    assert not list(tmp_path.rglob(f"*{storage.TEMPORARY}*"))


def test_a_bucket_that_is_not_there_is_named(s3_url: str) -> None:
    with pytest.raises(InputError, match=r"s3://no-such-bucket/a\.json: cannot be written: .*bucket does not exist"):
        storage.write_json("s3://no-such-bucket/a.json", 1)


def test_remove_temporary_removes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    keep = [
        tmp_path / "a.npy", tmp_path / "sub" / "b.tmp", tmp_path / "sub" / "report.tmp-2024.txt",
        tmp_path / "sub" / "x.tmp-DEADBEEF", tmp_path / "sub" / "x.tmp-deadbeef0", tmp_path / "sub" / ".tmp-deadbeef",
        tmp_path / "mine.txt.tmp-deadbeef", tmp_path / "mine" / "a.npy.tmp-deadbeef",
    ]  # fmt: skip
    left = [tmp_path / "a.npy.tmp-0123abcd", tmp_path / "sub" / "mine" / "x.tmp-deadbeef"]
    for path in [*keep, *left]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    storage.remove_temporary(str(tmp_path), r"a\.npy|sub")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(keep)
    storage.remove_temporary(f"{tmp_path}/not/there")
    storage.remove_temporary(str(tmp_path))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(keep[:-2])


def test_what_a_killed_writer_leaves_is_what_is_removed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(storage.files, "_discard", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            storage.write_json(f"{tmp_path}/a.json", 1)
    (left,) = tmp_path.iterdir()
    assert storage.is_temporary(left.name, "a.json")
    storage.remove_temporary(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_of_finished_work_the_records_are_removed_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        storage.once(f"{url}/{name}.json", lambda name=name: storage.write_array(f"{url}/{name}/x.npy", np.arange(3)))
    with monkeypatch.context() as patch:
        patch.setattr(storage.files, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            storage.remove_work(url)
    assert not any(storage.exists(f"{url}/{name}.json") for name in ("a", "b"))
    assert all(storage.exists(f"{url}/{name}/x.npy") for name in ("a", "b"))
    storage.remove_work(url)
    assert storage.listdir(url) == []
    storage.remove_work(url)


def test_a_full_disk_is_one_message_and_leaves_nothing(small_disk: Path) -> None:
    target = f"{small_disk}/a.npy"
    with pytest.raises(InputError, match=rf"{target}: no space left on the device"):
        storage.write_array(target, np.zeros(1 << 20))
    assert list(small_disk.iterdir()) == []
    storage.write_array(target, np.zeros(1 << 10))  # what was written was given back


def test_a_disk_that_is_full_at_the_last_byte(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 4096))
    with pytest.raises(InputError, match="no space left"), storage.atomic_writer(f"{small_disk}/a") as stream:
        stream.write(bytes(5000))  # less than a buffer, so the disk learns of it when the file is closed
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_full_quota_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no space left"), storage.atomic_writer(f"{tmp_path}/a"):
        raise OSError(errno.EDQUOT, "quota exceeded")
    with pytest.raises(InterruptedError), storage.atomic_writer(f"{tmp_path}/a"):
        raise InterruptedError(errno.EINTR, "something else")


def test_a_link_is_the_same_file_and_outlives_it(url: str) -> None:
    storage.write_json(storage.join(url, "old", "a.json"), [1])
    storage.link(storage.join(url, "old", "a.json"), storage.join(url, "new", "deep", "b.json"))
    storage.link(storage.join(url, "old", "a.json"), storage.join(url, "new", "deep", "b.json"))  # again
    storage.write_json(storage.join(url, "old", "a.json"), [2])  # another file of that name
    storage.remove(storage.join(url, "old"))
    assert storage.read_json(storage.join(url, "new", "deep", "b.json")) == [1]
    assert storage.listdir(storage.join(url, "new", "deep")) == ["b.json"]
    with pytest.raises(InputError, match="no such file"):
        storage.link(storage.join(url, "old", "a.json"), storage.join(url, "c.json"))


def test_a_link_to_another_disk_is_a_copy(small_disk: Path, tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/a.json", [1])
    storage.link(f"{tmp_path}/a.json", f"{small_disk}/a.json")
    assert storage.read_json(f"{small_disk}/a.json") == [1]
    assert [path.name for path in small_disk.iterdir()] == ["a.json"]


def test_json_round_trips(url: str) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    info = storage.write_json(f"{url}/a.json", value)
    assert storage.read_json(f"{url}/a.json") == value
    assert info == storage.file_info(f"{url}/a.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_json_that_was_cut_off_is_named(url: str, content: bytes) -> None:
    with storage.atomic_writer(f"{url}/a.json") as stream:
        stream.write(content)
    with pytest.raises(InputError, match=r"a\.json: not valid JSON"):
        storage.read_json(f"{url}/a.json")
    with pytest.raises(InputError, match=r"b\.json: no such file"):
        storage.read_json(f"{url}/b.json")


def test_a_stamp_tells_a_file_from_the_one_before(url: str) -> None:
    storage.write_json(f"{url}/a.json", 1)
    stamps = [storage.stamp(f"{url}/a.json") for _ in range(2)]
    storage.write_json(f"{url}/a.json", 2)  # of as many bytes
    stamps.append(storage.stamp(f"{url}/a.json"))
    assert stamps[0] == stamps[1] != stamps[2]
    assert stamps[2][:2] == (f"{url}/a.json", 2)
    with pytest.raises(InputError, match=r"b\.json: no such file"):
        storage.stamp(f"{url}/b.json")


def test_listing_and_removing(url: str) -> None:
    assert storage.listdir(url) == []
    for name in ("b.json", "a/c.json", "a/d.json"):
        storage.write_json(f"{url}/{name}", 1)
    assert storage.listdir(url) == ["a", "b.json"]
    assert storage.exists(f"{url}/a/c.json")
    storage.remove(f"{url}/a")
    storage.remove(f"{url}/never/was")
    assert names(url) == ["b.json"]
    assert not storage.exists(f"{url}/a/c.json")


def test_what_is_removed_is_no_pattern(url: str) -> None:
    fs, folder = storage.filesystem(url)
    for name in ("run*", "run[1]", "run1", "run2"):
        if storage.is_local(url):
            fs.makedirs(f"{folder}/{name}/source")
        for file in ("a.json", "[b*.json"):
            fs.pipe_file(f"{folder}/{name}/source/{file}", b"1")
    storage.remove(f"{url}/run[1]/source/[b*.json")
    assert storage.listdir(f"{url}/run[1]/source") == ["a.json"]
    storage.remove(f"{url}/run[1]")
    storage.remove_work(f"{url}/run*/source")
    assert not storage.exists(f"{url}/run*/source/a.json")
    assert not storage.exists(f"{url}/run[1]/source/a.json")
    for name in ("run1", "run2"):
        assert storage.listdir(f"{url}/{name}/source") == ["[b*.json", "a.json"]


def test_of_a_link_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    storage.remove(f"{tmp_path}/link")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["data", "data/a"]


def test_what_another_process_does_on_s3_is_seen_at_once(s3_url: str) -> None:
    storage.write_json(f"{s3_url}/a.json", "first")
    assert storage.listdir(s3_url) == ["a.json"]
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    path = s3_url.removeprefix("s3://")
    other.pipe_file(f"{path}/a.json", b'"a longer second"\n')
    other.pipe_file(f"{path}/b.json", b"1")
    assert storage.exists(f"{s3_url}/b.json")
    assert storage.file_info(f"{s3_url}/a.json")["bytes"] == 18
    other.rm_file(f"{path}/b.json")
    assert not storage.exists(f"{s3_url}/b.json")
    assert storage.listdir(s3_url) == ["a.json"]


@pytest.mark.parametrize("url", ["nope://bucket/x", "s4://bucket/x"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=f"{url}: cannot use this storage"):
        storage.filesystem(url)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute(f"file://{tmp_path}/a") == f"{tmp_path}/a"
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.is_local("runs/a")
    assert not storage.is_local("memory://a")


@given(array=ARRAYS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_round_trip(tmp_path: Path, array: np.ndarray) -> None:
    info = storage.write_array(f"{tmp_path}/a.npy", array)
    for found in (storage.open_array(f"{tmp_path}/a.npy"), np.load(tmp_path / "a.npy", allow_pickle=False)):
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    assert info == storage.file_info(f"{tmp_path}/a.npy")


@given(array=ARRAYS, data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_are_the_array(tmp_path: Path, array: np.ndarray, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(array)), max_size=3)))
    whole = storage.write_array(f"{tmp_path}/a.npy", array)
    chunks = np.split(np.asfortranarray(array), ends)
    assert storage.write_chunks(f"{tmp_path}/b.npy", array.dtype, array.shape, chunks) == whole
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_arrays_on_every_kind_of_storage(url: str) -> None:
    array = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    info = storage.write_chunks(f"{url}/a.npy", np.float32, (50, 4), iter(np.array_split(array, 7)))
    for known in (None, info):
        np.testing.assert_array_equal(storage.open_array(f"{url}/a.npy", known), array)
    with pytest.raises(InputError, match=r"b\.npy: no such file"):
        storage.open_array(f"{url}/b.npy")


@pytest.mark.parametrize("chunks", [[3, 3], [3, 3, 2], []])
def test_another_number_of_rows_than_announced_is_refused(url: str, chunks: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"{sum(chunks)} rows were written, 7 were announced"):
        storage.write_chunks(f"{url}/a.npy", np.int64, (7, 2), (np.zeros((rows, 2), np.int64) for rows in chunks))
    assert names(url) == []


def test_rows_of_another_shape_than_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows of shape \(3,\) were written, \(2,\) were announced"):
        storage.write_chunks(f"{tmp_path}/a.npy", np.int64, (4, 2), [np.zeros((4, 3))])
    assert names(str(tmp_path)) == []


def test_a_chunk_that_cannot_be_made_leaves_nothing(url: str) -> None:
    def chunks():  # type: ignore[no-untyped-def]
        yield np.zeros(3)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        storage.write_chunks(f"{url}/a.npy", np.float64, (6,), chunks())
    assert names(url) == []


def test_a_truncated_array_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    storage.write_array(str(path), np.arange(6.0))
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"a\.npy: not a whole \.npy array"):
            storage.open_array(str(path))


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path, array = tmp_path / "a.npy", np.arange(6.0)
    size = storage.write_array(str(path), array)["bytes"] - array.nbytes
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(size):
        for flip in rng.integers(1, 256, 3):
            path.write_bytes(content[:position] + bytes([content[position] ^ int(flip)]) + content[position + 1 :])
            try:
                storage.open_array(str(path))
            except InputError:
                refused += 1
    assert refused > size


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(InputError, match=r"a\.npy: not a whole \.npy array"):
        storage.open_array(f"{tmp_path}/a.npy")
    assert not (tmp_path / "sprung").exists()


def test_pickles_and_archives_are_no_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy: not a whole \.npy array"):
        storage.open_array(f"{tmp_path}/a.npy")
    np.savez(tmp_path / "b.npz", a=np.arange(3))
    with pytest.raises(InputError, match=r"b\.npz: not a \.npy array"):
        storage.open_array(f"{tmp_path}/b.npz")
    with pytest.raises(InputError, match="not a whole"):
        storage.open_array(str(tmp_path))


def test_a_remote_array_is_fetched_once(s3_url: str, local_cache: Path) -> None:
    info = storage.write_array(f"{s3_url}/a.npy", np.arange(5))
    storage.open_array(f"{s3_url}/a.npy", info)
    cached = [path for path in local_cache.rglob("*") if path.is_file()]
    assert [path.name for path in cached] == [f"{info['sha256']}.npy"]
    storage.remove(f"{s3_url}/a.npy")
    np.testing.assert_array_equal(storage.open_array(f"{s3_url}/a.npy", info), np.arange(5))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"\x01"], ids=["truncated", "flipped"])
def test_a_remote_array_that_was_damaged_is_refused_and_not_cached(s3_url: str, local_cache: Path, damage) -> None:  # type: ignore[no-untyped-def]
    info = storage.write_array(f"{s3_url}/a.npy", np.arange(5))
    fs, path = storage.filesystem(f"{s3_url}/a.npy")
    fs.pipe_file(path, damage(fs.cat_file(path)))
    with pytest.raises(InputError, match=r"a\.npy: damaged or truncated"):
        storage.open_array(f"{s3_url}/a.npy", info)
    assert not [path for path in local_cache.rglob("*") if path.is_file()]


def test_verify_accepts_what_was_written(url: str) -> None:
    files = {f"{name}/{name}.json": storage.write_json(f"{url}/{name}/{name}.json", name) for name in "abc"}
    storage.verify(url, files)
    storage.verify(url, {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'"b', "truncated or changed: 2 bytes, 4 were written"), (b'"c"\n', "damaged: its checksum"), (None, "missing")],
    ids=["truncated", "flipped", "missing"],
)
def test_verify_names_the_file_that_differs(url: str, content: bytes | None, reason: str) -> None:
    files = {f"{name}.json": storage.write_json(f"{url}/{name}.json", name) for name in "abc"}
    fs, path = storage.filesystem(f"{url}/b.json")
    if content is None:
        fs.rm_file(path)
    else:
        fs.pipe_file(path, content)
    with pytest.raises(InputError, match=rf"{url}/b\.json: {reason}"):
        storage.verify(url, files)


def test_a_checksum_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((1 << 22) * 2 + 7)  # more than two chunks
    (tmp_path / "a").write_bytes(content)
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert storage.file_info(f"{tmp_path}/a") == expected
    assert storage.copy_in(tmp_path / "a", f"{tmp_path}/sub/b") == expected
    assert (tmp_path / "sub" / "b").read_bytes() == content


def test_json_files_are_for_people(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/a.json", {"b": 1, "a": [1]})
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": [1], "b": 1}, indent=2) + "\n"
