"""Saving checkpoints: the file format, atomicity, and which checkpoints are kept."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffmoe_ds.checkpoint.layout import META, checkpoint_images, checkpoint_name
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, ScheduledValues
from diffmoe_ds.checkpoint.retention import surplus
from diffmoe_ds.checkpoint.save import CheckpointSaver
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.checkpoint.verify import candidates, newest_valid
from diffmoe_ds.config.schema import CheckpointConfig, Config
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import TMP_PREFIX, sha256_of


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cut=st.integers(1, 7),
)
def test_streamed_files_are_safetensors(tmp_path_factory, shapes, dtype, cut):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors = {f"t{i}/ü": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    entries = [Entry(name, tuple(t.shape), dtype, t.flatten().split(cut)) for name, t in tensors.items()]
    digest = write_safetensors(path, entries, {"format": "pt"})
    assert digest == (path.stat().st_size, sha256_of(path))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)


@given(
    images=st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True),
    keep_last=st.integers(0, 4),
    period=st.integers(0, 20),
    broken=st.sets(st.integers(1, 60)),
)
def test_retention_keeps_the_newest_valid_and_the_permanent_checkpoints(images, keep_last, period, broken):
    names = sorted(map(checkpoint_name, images), reverse=True)
    newest = names[0]
    removed = surplus(
        names, newest, CheckpointConfig(keep_last=keep_last, keep_every_images=period),
        lambda name: checkpoint_images(name) not in broken,
    )  # fmt: skip
    kept = [name for name in names if name not in removed]
    assert newest in kept
    if keep_last == 0:
        assert not removed
        return
    whole = [name for name in names if checkpoint_images(name) not in broken or name == newest]
    assert set(whole[:keep_last]) <= set(kept), "the N newest that can be read"
    if period:
        firsts = {min(group) for group in _by_multiple(images, period)}
        assert {checkpoint_name(n) for n in firsts} <= set(kept)
    permanent = len({n // period for n in images}) if period else 0
    assert len(kept) <= keep_last + permanent + 1


def _by_multiple(images: list[int], period: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for n in images:
        groups.setdefault(n // period, []).append(n)
    return [group for multiple, group in groups.items() if multiple > 0]


def metadata(images: int) -> CheckpointMetadata:
    return CheckpointMetadata(
        files=1, images=images, step=1, adam_step=1, shapes={}, config=Config(), lr_now=ScheduledValues(1e-3, (0.9,))
    )  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """Save a checkpoint with a given image count and no weights, as the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(images: int, **keep: int) -> Path:
        owner, root = Owner(secrets.token_hex(8)), tmp_path / "checkpoints"
        owner.claim(root)
        saver = CheckpointSaver(tmp_path, CheckpointConfig(**keep), torch.device("cpu"), owner)
        try:
            saver.start([], [], {"threshold": torch.zeros(1)}, metadata(images))
            return saver.finish()
        finally:
            saver.wait_for_retention()
            owner.release(root)

    yield save
    dist.destroy_process_group()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_checkpoints_of_an_abandoned_branch_no_longer_count(save, tmp_path, capsys):
    """Go back from 80 images to 48 and on to 80, then back to 72: each time, the later checkpoints are set aside."""
    for images in (16, 32, 64, 80):
        save(images, keep_last=4)
    assert not capsys.readouterr().out
    save(48, keep_last=2)
    assert capsys.readouterr().out.split()[:3] == ["left", "left-images_000000000064,", "left-images_000000000080:"]
    assert [path.name for path in candidates(tmp_path)] == [checkpoint_name(n) for n in (48, 32)]
    save(64, keep_last=2)
    save(80, keep_last=2)
    save(72, keep_last=0)
    assert [path.name for path in candidates(tmp_path)] == [checkpoint_name(72), "images_000000000064_2"]
    save(72, keep_last=0)
    left = [f"left-images_0000000000{name}" for name in ("64", "72", "80", "80_2")]
    kept = ["images_000000000064_2", "images_000000000072_2"]
    assert names(tmp_path) == [*kept, "latest", *left], "no name is reused"


@pytest.mark.parametrize("file", ("rank_00000.safetensors", META, "manifest.json", "latest"))
def test_a_full_disk_at_any_file_leaves_no_trace(save, tmp_path, monkeypatch, file):
    """Also at the pointer: a checkpoint that is reported as not saved does not exist."""
    save(16)
    before = names(tmp_path)

    fsync = os.fsync

    def full(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.name.removeprefix(TMP_PREFIX).startswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    expected = rf"images_000000000032 was not saved: rank 0 on .*: .*({file}|images_000000000032): cannot be "
    expected += r"written: No space left on device\.$"
    with pytest.raises(CheckpointError, match=expected):
        save(32)
    assert names(tmp_path) == before and newest_valid(tmp_path, full=True).name == checkpoint_name(16)


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_kept(save, tmp_path, monkeypatch):
    """Retention does not take it for a damaged one."""
    for images in (16, 32, 48):
        save(images)
    opened = os.open

    def fail(path: object, *arguments: object, **options: object) -> int:
        if str(path).endswith("images_000000000032/manifest.json"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "open", fail)
        save(64, keep_last=3)
    assert names(tmp_path) == [*map(checkpoint_name, (16, 32, 48, 64)), "latest"]
    save(80, keep_last=3)
    assert names(tmp_path) == [*map(checkpoint_name, (48, 64, 80)), "latest"]


def test_a_checkpoint_that_cannot_be_removed_is_named_in_plain_words(save, tmp_path, monkeypatch, capsys):
    def fail(owner: Owner, path: Path, *progress: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    save(16)
    monkeypatch.setattr(Owner, "remove", fail)
    save(32, keep_last=1)
    expected = f"{tmp_path}/checkpoints/{checkpoint_name(16)}: cannot be removed: Input/output error; older checkpoints"
    assert f"*** WARNING: {expected} are kept ***" in capsys.readouterr().err


def test_a_run_that_went_back_continues_from_its_own_checkpoint_if_latest_cannot_be_updated(
    save, tmp_path, monkeypatch, capsys
):  # fmt: skip
    for images in (16, 32, 48):
        save(images, keep_last=0)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target.name == "latest":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert save(32, keep_last=0).name == "images_000000000032_2"
    assert "latest: cannot be written: Input/output error; the checkpoint is saved" in capsys.readouterr().err
    assert candidates(tmp_path)[0].name == "images_000000000032_2"
