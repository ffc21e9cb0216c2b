"""Shards that are truncated, damaged, too big or changing: an error that names them, never a wrong sample."""

import os
import pickle
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ds.data.sources import compressed, tar_headers
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from tests.helpers.data import LABELLED, PNG, write_tar


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_big_members_are_refused_unless_they_are_never_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tar_headers, "MAX_MEMBER_BYTES", 1 << 20)
    assert ShardDataset([write_tar(tmp_path / name, [*LABELLED, ("a.txt", bytes(1_048_577))])])[0].label == 3
    for big in ("a.png", "a.cls"):
        path = write_tar(tmp_path / name, [(big, bytes(1_048_577))])
        with pytest.raises(DataError, match=f"member '{big}' of shard .* has 1048577 bytes; the limit is 1 MiB"):
            ShardDataset([path])


def test_big_gzipped_shards_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "MAX_UNPACKED_BYTES", 1 << 20)
    path = write_tar(tmp_path / "a.tar.gz", [("a.txt", bytes(2 << 20))])
    with pytest.raises(DataError, match=r"needs more than 1 MiB of memory when decompressed; store it as a plain .tar"):
        ShardDataset([path])


UNREADABLE = r"shard .*a.tar(.gz)? is not a readable, complete tar or tar.gz file: "
SIX_MEMBERS = [(f"{key}.{suffix}", PNG if suffix == "png" else b"1") for key in "abc" for suffix in ("png", "cls")]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_truncated_shard_is_refused(tmp_path_factory, name, data):
    path = write_tar(tmp_path_factory.mktemp("truncated") / name, SIX_MEMBERS)
    # Only the zero padding at the end of a plain tar may be missing; each member takes two blocks of 512 bytes.
    needed = 6 * 1024 + 512 if name == "a.tar" else path.stat().st_size
    os.truncate(path, data.draw(st.integers(0, needed - 1)))
    with pytest.raises(DataError, match=UNREADABLE):
        ShardDataset([path])


@settings(max_examples=40, deadline=None)
@given(member=st.integers(0, 5), byte=st.integers(0, 99), change=st.integers(1, 127))
def test_a_damaged_header_is_refused(tmp_path_factory, member, byte, change):
    path = write_tar(tmp_path_factory.mktemp("damaged") / "a.tar", SIX_MEMBERS)
    content = bytearray(path.read_bytes())
    content[member * 1024 + byte] ^= change
    path.write_bytes(content)
    with pytest.raises(DataError, match=UNREADABLE):
        ShardDataset([path])


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8bhello", bytes(100), random.Random(0).randbytes(2000)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=UNREADABLE):
        ShardDataset([tmp_path / "a.tar"])


def test_a_shard_that_changes_after_opening(tmp_path):
    path = write_tar(tmp_path / "a.tar", LABELLED)
    dataset = ShardDataset([path])
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"a.tar has 1000 bytes where \d+ were indexed, .*: it changed after opening"):
        dataset[0]
    path.unlink()
    with pytest.raises(DataError, match=r"shard .*a.tar can no longer be read: "):
        ShardDataset.__getitem__(pickle.loads(pickle.dumps(dataset)), 0)


@pytest.mark.parametrize("name", ["../../x.png", "/x.png", "a/../../x.cls"])
def test_a_name_that_leads_out_of_the_archive(tmp_path, name):
    members = [(name, PNG), *LABELLED]
    with pytest.raises(DataError, match=r"member '.*x\....' of shard .* has a name that leads out of the archive"):
        ShardDataset([write_tar(tmp_path / "a.tar", members)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(("name", "refused"), [("a.webp", True), ("b.cls", True), ("a.txt", False)])
def test_a_member_of_ten_gigabytes(tmp_path, name, refused, complete):
    """It is never read: as a sparse file it takes no space, and without its contents the shard is truncated."""
    path, size = tmp_path / "a.tar", 10 << 30
    small = write_tar(tmp_path / "small.tar", LABELLED).read_bytes()
    info = tarfile.TarInfo(name)
    info.size = size
    with open(path, "wb") as file:
        file.write(info.tobuf())
        if complete:
            file.seek(size, os.SEEK_CUR)
        file.write(small)
    if not refused and complete:
        assert ShardDataset([path])[0].label == 3
        return
    message = f"member '{name}' of shard .* has {size} bytes; the limit is 64 MiB" if refused else UNREADABLE
    with pytest.raises(DataError, match=message):
        ShardDataset([path])
