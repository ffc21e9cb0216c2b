"""A run that stops and starts again is the run that never stopped."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
import torch

from diffmoe_ds.checkpoint.load import CheckpointReader, find_checkpoint
from diffmoe_ds.errors import CheckpointError
from tests.conftest import read_metrics
from tests.test_layout import assert_same, tensors

SLOW_LAYOUTS = ((1, 1, 0, True), (2, 2, 0, False), (2, 1, 2, True), (2, 2, 3, True))


@pytest.mark.parametrize(
    ("world", "ep", "zero", "bf16"),
    [(2, 2, 1, False), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
)
def test_same_layout_resumes_bit_for_bit(train_tiny, tmp_path, world, ep, zero, bf16):
    """Train 5 steps with a save after 2; resume there; losses, weights, moments, EMA and thresholds are equal."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-3}}
    changes = {"bf16": {"enabled": bf16}, "scheduler": scheduler}
    straight = train_tiny(world, ep, zero, "run.save_every_images=32", **changes)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(straight.directory, interrupted)
    for folder in (interrupted / "checkpoints").iterdir():
        if folder.name not in ("latest", "images_000000000032"):
            shutil.rmtree(folder)
    (interrupted / "checkpoints" / "latest").write_text("images_000000000032\n")
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "ima')  # what a killed run leaves
    resumed = train_tiny(world, ep, zero, "run.save_every_images=32", directory=interrupted, **changes)
    assert "continues" in resumed.output and "at 32 images" in resumed.output
    assert resumed.column("step") == [1, 2, 3, 4, 5], "no step twice, none lost"
    for key in ("loss", "grad_norm", "lr"):
        assert resumed.column(key) == straight.column(key)
    ours, theirs = tensors(resumed), tensors(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    again = train_tiny(world, ep, zero, directory=interrupted, **changes)
    assert "were seen already" in again.output and again.metrics == read_metrics(interrupted)


@pytest.mark.slow
def test_ema_follows_the_weights_and_thresholds_are_copied(train_tiny):
    """ema_k = d ema_(k-1) + (1 - d) w_k, from the checkpoints of every step."""
    run = train_tiny(2, 2, 2, "run.save_every_images=16", "ema.decay=0.75")
    every = [CheckpointReader(p) for p in sorted((run.directory / "checkpoints").glob("images_*"))]
    assert len(every) == 5
    for name, shape in every[0].meta["shapes"].items():
        numel = torch.Size(shape).numel()
        for before, after in pairwise(every):
            expected = 0.75 * before.read("ema", name, 0, numel) + 0.25 * after.read("fp32", name, 0, numel)
            torch.testing.assert_close(after.read("ema", name, 0, numel), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_other_layouts_read_the_same_checkpoint(train_tiny, tmp_path):
    """What this version's format gives for free; the losses go on as if the layout had not changed."""
    straight = train_tiny(1, 1, 0)
    for number, (before, after) in enumerate((((1, 1, 0), (2, 2, 3)), ((2, 2, 3), (4, 2, 2)), ((4, 4, 1), (1, 1, 1)))):
        directory = tmp_path / f"moved_{number}"
        train_tiny(*before, "run.total_images=32", directory=directory)
        assert_same(train_tiny(*after, directory=directory), straight)


@pytest.fixture
def small_checkpoint(tmp_path, train_tiny):
    return train_tiny(1, 1, 1, "run.total_images=16")


def test_damaged_and_foreign_checkpoints_are_refused(small_checkpoint, train_tiny, tmp_path):
    good = find_checkpoint(small_checkpoint.directory)
    other = train_tiny(1, 1, 1, "model.depth=2", directory=small_checkpoint.directory, code=5)
    assert "is of another model: model.depth is 4 there and 2 here" in other.output
    assert "Traceback" not in other.output
    anew = train_tiny(1, 1, 1, directory=small_checkpoint.directory, code=5, options=("--resume", "none"))
    assert "--resume none would mix" in anew.output

    def damaged(name: str) -> CheckpointReader:
        copy = tmp_path / name
        shutil.copytree(good, copy)
        return copy

    cut = damaged("cut")
    data = (cut / "rank_00000.safetensors").read_bytes()
    (cut / "rank_00000.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: cannot be read"):
        CheckpointReader(cut)
    gone = damaged("gone")
    (gone / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: cannot be read"):
        CheckpointReader(gone)
    future = damaged("future")
    meta = json.loads((future / "meta.json").read_text())
    (future / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, but this version reads 1"):
        CheckpointReader(future)
