"""Atomic writes: the old contents or the new ones, and no leftovers; removal that does not follow links."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds import files
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import (
    REMOVING_PREFIX,
    TMP_PREFIX,
    atomic_write,
    remove_leftovers,
    remove_tree,
    replacing,
    sha256_of,
    write_error,
    write_json,
    write_tar,
    write_text,
)
from diffmoe_ds.outputs import write_together


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WAYS = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "tar": lambda path: write_tar(path, [("a.png", b"new")]),
    "together": lambda path: write_together(path.parent, {path.name: lambda tmp: write_text(tmp, "new")}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("owner", "function"), ((os, "fsync"), (Path, "replace")))
@pytest.mark.parametrize("before", (None, b"old"))
def test_a_failed_write_keeps_the_old_contents_and_leaves_nothing(
    tmp_path, monkeypatch, way, owner, function, before
):  # fmt: skip
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(owner, function, fail)
    with pytest.raises(CheckpointError, match=r"file: cannot be written: No space left on device\.$"):
        WAYS[way](path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("error", (OSError(errno.EIO, "Input/output error"), ValueError("a bug"), KeyboardInterrupt()))
def test_a_block_that_raises_changes_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)), atomic_write(path) as file:
        file.write(b"half of the ne")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


def test_an_error_about_another_file_names_that_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"source\.png: cannot be written"), atomic_write(tmp_path / "file"):
        open(tmp_path / "source.png").close()


def test_a_missing_directory_gives_a_one_sentence_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"none/file: cannot be written: No such file or directory\.$"):
        write_text(tmp_path / "none" / "file", "x")


@given(data=st.binary(max_size=300), old=st.none() | st.binary(max_size=10))
def test_contents_and_digests(tmp_path_factory, data, old):
    path = tmp_path_factory.mktemp("files") / "x"
    if old is not None:
        path.write_bytes(old)
    with atomic_write(path) as file:
        file.write(data)
    assert path.read_bytes() == data and sha256_of(path) == hashlib.sha256(data).hexdigest()
    for digest in (write_text(path, data.hex() + "ü"), write_json(path, {"x": data.hex()})):
        assert digest.size > 0
    assert digest == (path.stat().st_size, sha256_of(path)) and json.loads(path.read_text()) == {"x": data.hex()}


def test_a_reader_sees_old_or_new_contents_only(tmp_path):
    path, stop, seen = tmp_path / "file", threading.Event(), set()
    contents = {letter * 50_000 for letter in "ab"}
    write_text(path, min(contents))

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for text in sorted(contents) * 20:
        write_text(path, text)
    stop.set()
    reader.join()
    assert seen <= contents


@pytest.fixture
def precious(tmp_path) -> Path:
    """A directory that no removal may reach through a link."""
    directory = tmp_path / "precious"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "file").write_text("keep")
    yield directory
    assert (directory / "sub" / "file").read_text() == "keep"


def test_links_are_removed_and_not_followed(tmp_path, precious):
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "to-directory").symlink_to(precious)
    (tree / "inner" / "to-file").symlink_to(precious / "sub" / "file")
    (tree / "to-nothing").symlink_to(tmp_path / "nothing")
    remove_tree(tree)
    assert not tree.exists()
    for target in (precious, precious / "sub" / "file", tmp_path / "nothing"):
        link = tmp_path / "link"
        link.symlink_to(target)
        remove_tree(link)
        assert not link.is_symlink()


def test_a_directory_that_becomes_a_link_is_not_followed(tmp_path, precious, monkeypatch):
    """Another process replaces it between the check and the removal."""
    tree = tmp_path / "tree"
    tree.symlink_to(precious)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(OSError):
        remove_tree(tree)
    remove_tree(tree, ignore_errors=True)


def test_removal_of_a_missing_path(tmp_path):
    remove_tree(tmp_path / "none")
    (tmp_path / "file").touch()
    remove_tree(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_removal_are_raised_or_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match="No space"):
        remove_tree(tmp_path / "file")
    remove_tree(tmp_path / "file", ignore_errors=True)


def test_leftovers_of_killed_processes(tmp_path, precious):
    """The names are those that every version has used; nothing else is removed."""
    for name in (f"{TMP_PREFIX}images_000000000016", ".removing-images_000000000032", "images_000000000048"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "rank_00000.safetensors").touch()
    for name in (".writing-latest", ".writing-shards-00000.tar-0123", "latest", ".hidden"):
        (tmp_path / "root" / name).touch()
    (tmp_path / "root" / ".writing-link").symlink_to(precious)
    remove_leftovers(tmp_path / "root")
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == [".hidden", "images_000000000048", "latest"]


def test_replacing_works_for_directories_too(tmp_path):
    with replacing(tmp_path / "out") as tmp:
        tmp.mkdir()
        (tmp / "file").touch()
    assert (tmp_path / "out" / "file").exists()
    with pytest.raises(ValueError, match="half"), replacing(tmp_path / "two") as tmp:
        tmp.mkdir()
        raise ValueError("half")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_system_that_cannot_flush_a_directory_is_accepted(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_directories(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", refuse_directories)
    assert write_text(tmp_path / "x", "text").size == 4


@pytest.mark.parametrize("name", [f"{TMP_PREFIX}a-0", f"{REMOVING_PREFIX}a"])
def test_an_error_does_not_name_a_temporary_file(name):
    error = OSError(errno.EROFS, "Read-only file system", f"/out/{name}")
    assert str(write_error(Path("/out/a"), error)) == "/out/a: cannot be written: Read-only file system."
