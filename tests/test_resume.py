"""A run that stops and starts again is the run that never stopped."""

from __future__ import annotations

import io
import shutil
import tarfile
from itertools import pairwise

import pytest
import torch
from PIL import Image

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.model_file import ModelFileReader
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.cli import main
from tests.conftest import TINY, WORKERS, read_metrics, run_ranks, write_json
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

    if zero == 1:
        again = train_tiny(world, ep, zero, directory=interrupted, **changes)
        assert "were seen already" in again.output and again.metrics == read_metrics(interrupted)


@pytest.mark.slow
def test_ema_follows_the_weights_and_thresholds_are_copied(train_tiny):
    """ema_k = d ema_(k-1) + (1 - d) w_k, from the checkpoints of every step."""
    run = train_tiny(2, 2, 2, "run.save_every_images=16", "checkpoint.keep_last=0", "ema.decay=0.75")
    every = [CheckpointReader(p) for p in sorted((run.directory / "checkpoints").glob("images_*"))]
    assert len(every) == 5
    for name, shape in every[0].meta["shapes"].items():
        numel = torch.Size(shape).numel()
        for before, after in pairwise(every):
            expected = 0.75 * before.read("ema", name, 0, numel) + 0.25 * after.read("fp32", name, 0, numel)
            torch.testing.assert_close(after.read("ema", name, 0, numel), expected, atol=1e-6, rtol=1e-5)


LAYOUTS = ((1, 1, 0), (2, 2, 1), (2, 1, 2), (2, 2, 3), (4, 2, 2), (4, 4, 3))
PAIRS = [(a, LAYOUTS[(i + step) % 6]) for i, a in enumerate(LAYOUTS) for step in (1, 2)]


@pytest.mark.slow
def test_every_layout_continues_every_other(train_tiny, tmp_path):
    """3 steps in one layout, saved, 3 more in another: losses, weights, moments, EMA, thresholds of 6 straight ones."""
    assert len(PAIRS) == 12 and {a for a, _ in PAIRS} == {b for _, b in PAIRS} == set(LAYOUTS)
    length = "run.total_images=96"
    straight = train_tiny(1, 1, 0, length)
    halves = {layout: train_tiny(*layout, "run.total_images=48").directory for layout in LAYOUTS}
    for number, (before, after) in enumerate(PAIRS):
        directory = shutil.copytree(halves[before], tmp_path / f"moved_{number}")
        moved = train_tiny(*after, length, directory=directory)
        assert "at 48 images, resharding: " in moved.output, (before, after)
        assert_same(moved, straight)


@pytest.mark.slow
def test_batch_arithmetic_and_ranks_may_change_and_the_images_stay(train_tiny, tmp_path):
    """Resumed with 2 x 4 images a rank, then 1 x 16: another pool, so other losses, but the same length and images."""
    directory = tmp_path / "run"
    train_tiny(2, 2, 1, "run.total_images=32", directory=directory)
    train_tiny(1, 1, 0, "run.total_images=64", directory=directory, gradient_accumulation_steps=4)
    last = train_tiny(2, 1, 3, "run.total_images=128", directory=directory, train_batch_size=32)
    assert last.column("images") == [16, 32, 48, 64, 96, 128]
    assert "global_batch 16 -> 32" in last.output and "accumulation 4 -> 1" in last.output


def test_a_new_run_begins_with_an_exported_model(train_tiny, tmp_path):
    """Fine-tuning: the first loss is the one that the exported weights give, also with other classes."""
    source = train_tiny(1, 1, 1, "run.total_images=48")
    assert main(["checkpoint", "export", str(source.directory), "--out", str(tmp_path / "model")]) == 0
    tuned = train_tiny(2, 2, 2, f"model.init_from={tmp_path / 'model'}", "run.total_images=16", "optimizer.lr=1e-12")
    assert "starts anew with the weights of" in tuned.output
    exported, first = ModelFileReader(tmp_path / "model"), tensors(tuned)
    for name in CheckpointReader(newest_valid(tuned.directory, full=True)).meta["shapes"]:
        expected = exported.read("ema", name, 0, first[f"fp32/{name}"].numel())
        assert torch.allclose(first[f"fp32/{name}"], expected, atol=1e-9)
    wrong = train_tiny(1, 1, 1, "model.init_from=/nowhere", code=5)
    assert "model.init_from /nowhere: is no exported model, checkpoint or run" in wrong.output


def test_foreign_checkpoints_are_refused(train_tiny):
    run = train_tiny(1, 1, 1, "run.total_images=16")
    other = train_tiny(1, 1, 1, "model.depth=2", directory=run.directory, code=5)
    assert "is of another model: model.depth is 4 there and 2 here" in other.output
    assert "Traceback" not in other.output
    anew = train_tiny(1, 1, 1, directory=run.directory, code=5, options=("--resume", "none"))
    assert "--resume none would mix" in anew.output


WHOLE_EPOCH = ((1, 48, 0), (2, 48, 1), (4, 48, 0), (3, 96, 0))
"""(ranks, images until the next resume, loader workers)."""


@pytest.mark.slow
def test_every_image_of_an_epoch_is_seen_exactly_once(tmp_path):
    """240 images, three resumes, on 1, 2, 4 and 3 ranks; the keys are written down by those who train on them."""
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(240):
            picture = io.BytesIO()
            Image.new("L", (28, 28), number).save(picture, "png")
            for suffix, data in (("png", picture.getvalue()), ("cls", b"3")):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    total = 0
    for ranks, images, workers in WHOLE_EPOCH:
        total += images
        config = write_json(tmp_path / "ds.json", ep=1, zero=1, train_batch_size=24)
        overrides = [*TINY, f"data.path={shard}", f"data.num_workers={workers}", f"run.total_images={total}"]
        arguments = ["--deepspeed_config", str(config), "--run-dir", str(tmp_path / "run"), "--set", *overrides]
        worker = [str(WORKERS / "record_keys.py"), str(tmp_path / "keys"), "train", *arguments]
        finished = run_ranks(ranks, worker)
        assert finished.code == 0, finished.output
    keys = [key for file in sorted((tmp_path / "keys").iterdir()) for key in file.read_text().split()]
    assert sorted(keys) == [f"{number:04d}" for number in range(240)]
