"""The index of shards on a full disk, and damage to a copy of it."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import contextmanager

import numpy as np
import pytest

from diffmoe_ds.data.sources.index_files import INDEX, KEYS, SAMPLES, load_index, save_index
from diffmoe_ds.data.sources.shard_paths import kept_index
from diffmoe_ds.data.sources.tar_index import Entry, Index, ShardInfo
from diffmoe_ds.errors import CheckpointError, DataError


@pytest.fixture
def index():
    rows = [Entry(0, 0, 512 + n, 100, n, n, 2) for n in range(50)]
    samples = np.array(rows, np.int64)
    return Index((ShardInfo("a.tar", 10240, 50),), samples, np.arange(100, dtype=np.uint8))


@contextmanager
def full_after(size: int):
    """Let every write beyond a size of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_and_leaves_no_part(tmp_path, index):
    with (
        full_after(1000),
        pytest.raises(CheckpointError, match="cannot be written: File too large"),
    ):
        save_index(index, tmp_path)
    assert not os.listdir(tmp_path)
    save_index(index, tmp_path)
    with (tmp_path / SAMPLES).open("rb") as file:
        assert file.read() == saved_by_numpy(tmp_path, index.samples)
    assert (load_index(tmp_path).keys == index.keys).all()


def saved_by_numpy(folder, array):
    np.save(folder / "expected.npy", array)
    return (folder / "expected.npy").read_bytes()


def test_a_copy_of_the_index_is_made_again(tmp_path, index):
    """If the disk was full, or if the copy is damaged: the shards still have everything."""
    (tmp_path / "a.tar").write_bytes(b"\0" * 10240)
    made = []

    def make():
        made.append(1)
        return index

    def kept():
        return kept_index(tmp_path, [str(tmp_path / "a.tar")], make).samples

    with full_after(1000):
        assert (kept() == index.samples).all()
    assert (kept() == index.samples).all() and len(made) == 2
    assert (kept() == index.samples).all() and len(made) == 2
    (folder,) = tmp_path.glob(".diffmoe-index-*")
    for number, name in enumerate((SAMPLES, KEYS, INDEX)):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        assert (kept() == index.samples).all() and len(made) == 3 + number
    assert (kept() == index.samples).all() and len(made) == 5


def test_an_array_of_the_wrong_size_is_not_hashed(tmp_path, index, monkeypatch):
    """A sparse file of terabytes takes no space."""
    save_index(index, tmp_path)
    os.truncate(tmp_path / SAMPLES, 3 << 30)
    monkeypatch.setattr("diffmoe_ds.data.sources.index_files.has_sha256", lambda *_, **__: pytest.fail("hashed"))
    with pytest.raises(DataError, match="has another size"):
        load_index(tmp_path)
