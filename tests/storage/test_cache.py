"""The cache of remote files: one download per file and host, an own folder, a budget, and nothing damaged believed."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rbm_dist import storage
from rbm_dist.errors import InputError, RunError
from tests.patience import patient
from tests.storage.proxy import STALL, FaultyProxy

SPAWN = multiprocessing.get_context("spawn")


def written(url: str, name: str, values: int = 125_000) -> tuple[str, storage.FileInfo]:
    """An array of a megabyte, and what is known of it."""
    path = f"{url}/{name}.npy"
    return path, storage.write_array(path, np.full(values, ord(name[0])))


def total(url: str, info: storage.FileInfo) -> int:
    return int(storage.open_array(url, info).sum())


def files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.iterdir()}


@pytest.fixture
def cache(local_cache: Path) -> Path:
    return local_cache / "cache"


def test_many_processes_share_one_download(network: FaultyProxy, s3_url: str, cache: Path) -> None:
    array = written(s3_url, "a")
    before = network.bytes
    with ProcessPoolExecutor(4, SPAWN) as pool:
        sums = [each.result(patient(60)) for each in [pool.submit(total, *array) for _ in range(8)]]
    assert sums == [125_000 * ord("a")] * 8
    assert array[1]["bytes"] <= network.bytes - before < 1.1 * array[1]["bytes"]
    assert files(cache) == {f"{array[1]['sha256']}.npy": array[1]["bytes"]}


def test_who_waits_goes_on_when_the_fetching_process_is_killed(
    network: FaultyProxy, s3_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBM_DIST_STORAGE_TIMEOUT_S", str(patient(60)))
    array = written(s3_url, "a")
    network.matching, network.faults = "^GET", [STALL]
    first = SPAWN.Process(target=total, args=array)
    first.start()
    while network.faults:
        time.sleep(0.01)
    with ProcessPoolExecutor(1, SPAWN) as pool:
        second = pool.submit(total, *array)
        time.sleep(0.5)
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        assert second.result(patient(60)) == 125_000 * ord("a")
    first.join()
    assert list(files(cache)) == [f"{array[1]['sha256']}.npy"]


def test_who_waits_is_not_kept_waiting_by_those_who_map_the_file(
    network: FaultyProxy, s3_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBM_DIST_STORAGE_TIMEOUT_S", str(patient(3)))
    array = written(s3_url, "a")
    network.matching, network.faults = "^GET", [STALL]  # so that the others come while one is fetching
    with ThreadPoolExecutor(4) as pool:
        mapped = list(pool.map(lambda _: storage.open_array(*array), range(4)))
    assert [int(each.sum()) for each in mapped] == [125_000 * ord("a")] * 4
    assert sum("GET" in line for line in network.requests) == 2


def test_a_fetching_process_that_hangs_is_named(s3_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, info = written(s3_url, "a")
    part = storage.cache_folder() / f"{info['sha256']}.part"
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setenv("RBM_DIST_STORAGE_TIMEOUT_S", "0.1")
        with pytest.raises(RunError, match=rf"^{url}: another process of this host is fetching it to {part}, and has"):
            storage.open_array(url, info)
    assert part.exists(), "it is the other's"
    monkeypatch.delenv("RBM_DIST_STORAGE_TIMEOUT_S")
    assert total(url, info) == 125_000 * ord("a"), "which is gone now"
    assert list(files(cache)) == [f"{info['sha256']}.npy"]


def test_the_longest_unused_goes_first_and_what_is_mapped_stays(
    s3_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBM_DIST_CACHE_GB", "0.0035")  # three of the arrays
    a, b, c, d, e = arrays = [written(s3_url, name) for name in "abcde"]
    mapped = storage.open_array(*a)
    for array in (b, c, b, d):
        total(*array)

    def held() -> set[str]:
        names = files(cache)
        return {name for name, (_, info) in zip("abcde", arrays, strict=True) if f"{info['sha256']}.npy" in names}

    assert held() == {"a", "b", "d"}
    also = storage.open_array(*b)[10:20]  # a view holds the mapping, too
    total(*e)
    assert held() == {"a", "b", "e"}
    third = storage.open_array(*e)
    with pytest.raises(InputError, match=rf"^{cache}: no room for {d[0]}: .* 0\.00 GB .* RBM_DIST_CACHE_GB"):
        storage.open_array(*d)
    assert held() == {"a", "b", "e"}
    assert (mapped.sum(), also.sum(), third.sum()) == (125_000 * ord("a"), 10 * ord("b"), 125_000 * ord("e"))
    del third
    assert total(*d) == 125_000 * ord("d")


def test_what_a_killed_process_left_is_removed(s3_url: str, cache: Path) -> None:
    left, used = storage.cache_folder() / "0.part", storage.cache_folder() / "1.part"
    left.touch()
    with used.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        total(*written(s3_url, "a"))
        assert used.exists()
    assert not left.exists()


def cut_off(path: Path) -> None:
    os.truncate(path, 1000)


def write_to(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\x93N")


@pytest.mark.parametrize("damage", [cut_off, write_to])
def test_a_cached_file_that_was_cut_off_or_written_to_is_fetched_again(s3_url: str, cache: Path, damage) -> None:  # type: ignore[no-untyped-def]
    array = written(s3_url, "a")
    total(*array)
    (path,) = cache.iterdir()
    path.chmod(0o600)
    damage(path)
    assert total(*array) == 125_000 * ord("a")
    assert files(cache) == {path.name: array[1]["bytes"]}


def test_without_a_checksum_a_changed_file_is_another_one(s3_url: str, cache: Path) -> None:
    url, _ = written(s3_url, "a")
    assert storage.open_array(url).sum() == storage.open_array(url).sum() == 125_000 * ord("a")
    assert len(files(cache)) == 1
    storage.write_array(url, np.full(125_000, 1))
    assert storage.open_array(url).sum() == 125_000


@pytest.mark.parametrize("kind", ["link", "file", "other", "writable"])
def test_a_folder_that_is_not_this_users_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RBM_DIST_CACHE", str(folder))
    (tmp_path / "mine").mkdir()
    if kind == "link":
        folder.symlink_to(tmp_path / "mine")
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
    if kind == "other":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder to another user")
        os.chown(folder, 12345, 12345)
    if kind == "writable":
        folder.chmod(0o770)
    found = {
        "link": "is a link",
        "file": "no cache",
        "other": "belongs to another user",
        "writable": "others may write",
    }
    with pytest.raises(InputError, match=rf"^{folder}: {found[kind]}.* set RBM_DIST_CACHE to a folder of your own"):
        storage.cache_folder()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RBM_DIST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which is to be ignored
    assert storage.cache_folder() == tmp_path / ".cache" / "rbm-dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.cache_folder() == tmp_path / "xdg" / "rbm-dist"
    assert storage.cache_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", ["much", "0", "-1", "nan"])
def test_a_budget_that_is_no_number_is_refused(local_cache: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RBM_DIST_CACHE_GB", value)
    with pytest.raises(InputError, match=f"RBM_DIST_CACHE_GB: gigabytes expected, found '{value}'"):
        storage.budget()


def test_the_default_budget_does_not_shrink_as_the_cache_fills(s3_url: str, cache: Path) -> None:
    before = storage.budget()
    total(*written(s3_url, "a", 4_000_000))
    assert abs(storage.budget() - before) < 0.01 * before


def test_a_full_disk_is_one_message(s3_url: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBM_DIST_CACHE", str(small_disk / "cache"))
    monkeypatch.setenv("RBM_DIST_CACHE_GB", "1")
    with pytest.raises(InputError, match="no space left on the device"):
        storage.open_array(*written(s3_url, "a", 1 << 20))
    assert not list((small_disk / "cache").iterdir())


def test_where_files_cannot_be_locked_each_process_fetches_and_nothing_is_evicted(
    s3_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on Lustre without `-o flock`; no such file system can be mounted here."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("RBM_DIST_CACHE_GB", "0.0015")
    assert total(*written(s3_url, "a")) == 125_000 * ord("a")
    assert "files cannot be locked there" in caplog.text
    with pytest.raises(InputError, match="no room"):
        total(*written(s3_url, "b"))
    assert len(files(cache)) == 1
