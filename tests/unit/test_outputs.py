"""Outputs of several files: all appear or none, and they are those of one process, even if another was suspended."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ds.cli.sample_images import ImageSet
from diffmoe_ds.cli.sample_set import ShardedSet, open_set
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import remove_tree, write_text
from diffmoe_ds.outputs import new_directory, write_together
from tests.unit.test_sample_sets import COUNTS, OneProcess


def test_files_written_together_all_appear_or_none(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(CheckpointError, match="two"):
        write_together(out, {"one": lambda path: write_text(path, "1"), "two": fail_at})
    assert list(out.iterdir()) == []
    made = write_together(out, {"one": lambda path: write_text(path, "1"), "two": lambda path: write_text(path, "2")})
    assert made == [out / "one", out / "two"] and sorted(p.name for p in out.iterdir()) == ["one", "two"]


def test_files_that_cannot_all_be_published_are_taken_back(monkeypatch, tmp_path):
    writers = {name: lambda path: path.write_text("new") for name in ("one", "two")}
    before_rename(monkeypatch, 2, lambda: fail_at(tmp_path / "two"))
    with pytest.raises(CheckpointError, match="two: cannot be written: No space left on device"):
        write_together(tmp_path, writers)
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in write_together(tmp_path, writers)] == ["one", "two"]


def fail_at(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def before_rename(monkeypatch: pytest.MonkeyPatch, n: int, action: Callable[[], object]) -> None:
    """Run an action just before the n-th rename from now on, as if the process had been suspended there."""
    calls = []

    def replace(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == n:
            action()
        os.replace(path, target)
        return Path(target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "rename", replace)


@pytest.mark.parametrize("n", (1, 2))
def test_files_written_together_are_those_of_one_process(monkeypatch, tmp_path, n):
    def write(text: str) -> None:
        write_together(tmp_path, {name: lambda path: path.write_text(text) for name in ("one", "two")})

    before_rename(monkeypatch, n, lambda: write("new"))
    with pytest.raises(CheckpointError) as caught:
        write("old")
    assert str(caught.value).startswith(f"{tmp_path}: another process has begun to write it"), caught.value
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "new", "two": "new"}


def test_a_new_directory_holds_the_files_of_one_process(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="another process has begun to write it"), new_directory(out) as old:
        (old / "one").write_text("old")
        with new_directory(out) as new:
            (new / "one").write_text("new")
            with pytest.raises(FileNotFoundError):
                (old / "two").write_text("old")
            (new / "two").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_text() for path in out.iterdir()} == {"one": "new", "two": "new"}


def test_what_a_killed_process_left_of_a_new_directory_is_removed(tmp_path):
    for name in (".writing-out", ".writing-out-0123456789ab"):  # of an earlier version, and of this one
        (tmp_path / name / "new").mkdir(parents=True)
    (tmp_path / ".writing-output-0123456789ab").mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-output-0123456789ab", "out"]


def generate_set(images: ImageSet) -> ShardedSet:
    """Generate and publish a set of black or white images, depending on their seed."""
    made = open_set(images, lambda: {"seed": images.seed}, 1, False, OneProcess())
    for shard in made.shards:
        made.files.write(shard, np.full((1, 4, 4, 1), images.seed, np.uint8), COUNTS)
    made.assemble()
    return made


def result(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("format_of_new", ("npz", "both"))
def test_a_suspended_command_changes_nothing_in_a_set_that_another_one_has_taken_over(
    monkeypatch, tmp_path, format_of_new
):
    """It wakes up before any of its renames, when the other command has finished or has written half of its shards."""
    out, old = tmp_path / "out", ImageSet(2, 0, (0,), "cycle", tmp_path / "out", "both")
    new = dataclasses.replace(old, seed=255, format=format_of_new)
    generate_set(dataclasses.replace(new, out=tmp_path / "expected"))
    for n in itertools.count(1):
        remove_tree(out)
        with monkeypatch.context() as patch:
            before_rename(patch, n, lambda: remove_tree(out / "unfinished") or generate_set(new))
            try:
                generate_set(old)
            except CheckpointError:
                ended = False
            else:
                ended = True
        if ended:
            break
        assert result(out) == result(tmp_path / "expected"), n
    assert n > 5

    made = open_set(old, lambda: {"seed": 0}, 1, False, OneProcess())
    later = open_set(new, lambda: {"seed": 255}, 1, False, OneProcess())
    with pytest.raises(CheckpointError):
        made.files.write(made.shards[0], np.zeros((1, 4, 4, 1), np.uint8), COUNTS)
    assert str(made.files.taken_over()).startswith(f"{out}: another process has begun to write it")
    made.discard_if_empty()
    assert later.files.taken_over() is None
    for shard in later.shards:
        later.files.write(shard, np.full((1, 4, 4, 1), 255, np.uint8), COUNTS)
    later.assemble()
    assert result(out) == result(tmp_path / "expected")
