"""Checksums of index files: one process of a host verifies them, and a file that has changed is verified again."""

import hashlib
import multiprocessing
import os
import time

import numpy as np
import pytest

from diffmoe_ds.data.sources import verified
from diffmoe_ds.data.sources.index_files import SAMPLES, load_index, save_index
from diffmoe_ds.data.sources.tar_index import Entry, Index, ShardInfo
from diffmoe_ds.data.sources.verified import has_sha256
from diffmoe_ds.errors import DataError


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[str]:
    """The names of the files that are hashed; records are kept in a folder of the test, also of small new files."""
    names = []
    whole = verified.sha256_of

    def counted(path):
        names.append(path.name)
        return whole(path)

    monkeypatch.setattr(verified, "sha256_of", counted)
    monkeypatch.setattr(verified, "DEFAULT_FOLDER", tmp_path / "cache")
    monkeypatch.setattr(verified, "SMALLEST", 0)
    monkeypatch.setattr(verified, "SETTLED_S", -1e9)
    return names


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    return path


TICK_S = 0.05
"""Longer than a tick of the file system's clock: a change within the same one would go unnoticed, see `SETTLED_S`."""
SHA256 = hashlib.sha256(b"contents").hexdigest()


def test_a_file_is_hashed_once_until_it_changes(file, hashed):
    assert [has_sha256(file, SHA256) for _ in range(3)] == [True] * 3 and len(hashed) == 1
    assert has_sha256(file, SHA256, rehash=True) and len(hashed) == 2
    time.sleep(TICK_S)
    status = file.stat()
    with open(file, "r+b") as opened:
        opened.write(b"C")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time of change of the inode remains
    assert [has_sha256(file, SHA256) for _ in range(2)] == [False] * 2 and len(hashed) == 4, "failures are not kept"
    changed = hashlib.sha256(b"Contents").hexdigest()
    assert has_sha256(file, changed) and has_sha256(file, changed) and len(hashed) == 5
    os.replace(file, file.with_name("moved"))
    file.write_bytes(b"Contents")
    assert has_sha256(file, changed) and len(hashed) == 6


def test_a_record_expires(file, hashed, monkeypatch):
    now = time.monotonic()
    for seconds, count in ((0, 1), (3599, 1), (3601, 2), (3000, 3)):  # the last is before the record was made
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        assert has_sha256(file, SHA256) and len(hashed) == count


def test_recently_changed_and_small_files_have_no_record(file, hashed, monkeypatch):
    monkeypatch.setattr(verified, "SETTLED_S", 1e9)
    assert has_sha256(file, SHA256) and has_sha256(file, SHA256) and len(hashed) == 2
    monkeypatch.setattr(verified, "SETTLED_S", -1e9)
    monkeypatch.setattr(verified, "SMALLEST", 9)
    assert has_sha256(file, SHA256) and has_sha256(file, SHA256) and len(hashed) == 4


@pytest.mark.parametrize("record", ["empty", "half", "long", "binary", "link", "directory", "no folder"])
def test_damaged_records_are_not_trusted(file, hashed, tmp_path, record):
    assert has_sha256(file, SHA256)
    [path] = (tmp_path / "cache" / "verified").iterdir()
    kept = path.read_text()
    path.unlink()
    if record == "link":
        (tmp_path / "elsewhere").write_text(kept)
        path.symlink_to(tmp_path / "elsewhere")
    elif record == "directory":
        path.mkdir()
    elif record == "no folder":
        path.parent.rmdir()
        path.parent.write_text("")
    else:
        other = {"empty": b"", "half": kept[:-30].encode(), "long": b"9" * 10**5, "binary": b"\xff\x00"}
        path.write_bytes(other[record])
    assert has_sha256(file, SHA256) and len(hashed) == 2
    if record == "link":
        assert (tmp_path / "elsewhere").read_text() == kept


@pytest.mark.parametrize("boot", [None, "another start"])
def test_records_end_with_a_restart_of_the_host(file, hashed, monkeypatch, boot):
    assert has_sha256(file, SHA256) and len(hashed) == 1
    monkeypatch.setattr(verified, "_boot_id", lambda: boot)
    assert has_sha256(file, SHA256) and len(hashed) == 2


def test_a_suspended_process_does_not_block_the_others(file, hashed):
    with verified._record(file, wait_s=60), verified._record(file, wait_s=0.1) as record:
        assert record is not None


def verify(path, log) -> None:
    slow = verified.sha256_of

    def logged(path):
        with open(log, "a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return slow(path)

    verified.sha256_of = logged
    os._exit(not has_sha256(path, SHA256))


def test_one_process_hashes_for_all_that_start_together(file, hashed, tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=verify, args=(file, tmp_path / "log")) for _ in range(5)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 5
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_an_index_is_verified_once(tmp_path, hashed):
    rows = np.array([Entry(0, 0, 512, 9, 3, 0, 1), Entry(0, 0, 2048, 9, 4, 1, 1)], np.int64)
    save_index(Index((ShardInfo("a.tar", 4096, 2),), rows, np.frombuffer(b"ab", np.uint8)), tmp_path)
    for _ in range(3):
        index = load_index(tmp_path)
        assert (index.samples == rows).all() and isinstance(index.samples, np.memmap)
    assert sorted(hashed) == ["index-keys.npy", "index-samples.npy"]
    load_index(tmp_path, rehash=True)
    assert len(hashed) == 4
    time.sleep(TICK_S)
    rows[1, Entry._fields.index("label")] = 5
    np.save(tmp_path / SAMPLES, rows)
    with pytest.raises(DataError, match="do not match each other"):
        load_index(tmp_path)
