"""A run that is interrupted and resumed matches a run that never stopped."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise, permutations

import pytest
import torch

from diffmoe_ds.checkpoint.export import ModelFileReader
from diffmoe_ds.checkpoint.layout import META
from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.cli import main
from tests.distributed.test_layout import assert_same, tensors
from tests.helpers.checkpoints import reseal
from tests.helpers.data import numbered_shard
from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import read_metrics, training_arguments, write_json

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-3}}
SLOW_LAYOUTS = ((1, 1, 0, True), (2, 1, 0, True), (2, 2, 0, False), (2, 1, 2, True), (2, 2, 3, True))


@pytest.mark.parametrize(
    ("world", "ep", "zero", "bf16"),
    [(2, 2, 1, False), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
)
def test_same_layout_resumes_bit_for_bit(train_tiny, tmp_path, world, ep, zero, bf16):
    """Train 5 steps with a save after 2; resume there; losses, weights, moments, EMA and thresholds are equal.

    Only the first run evaluates on held-out images, after every step: that does not change the training.
    """
    changes = {"bf16": {"enabled": bf16}, "scheduler": SCHEDULER}
    held_out = f"data.validation_path={numbered_shard(tmp_path / 'held_out.tar', 10)}"
    straight = train_tiny(world, ep, zero, "run.save_every_images=32", held_out, "eval.every_images=16", **changes)
    evaluated = read_metrics(straight.directory, "validation.jsonl")
    assert [row["step"] for row in evaluated] == [1, 2, 3, 4, 5]
    interrupted = tmp_path / "interrupted"
    shutil.copytree(straight.directory, interrupted)
    for folder in (interrupted / "checkpoints").iterdir():
        if folder.name not in ("latest", "images_000000000032"):
            shutil.rmtree(folder)
    (interrupted / "checkpoints" / "latest").write_text("images_000000000032\n")
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "ima')  # what a killed run leaves behind
    resumed = train_tiny(world, ep, zero, "run.save_every_images=32", directory=interrupted, **changes)
    assert "continues" in resumed.output and "at 32 images" in resumed.output
    assert resumed.column("step") == [1, 2, 3, 4, 5], "no step repeated or lost"
    for key in ("loss", "grad_norm", "lr"):
        assert resumed.column(key) == straight.column(key)
    ours, theirs = tensors(resumed), tensors(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_metrics(interrupted, "validation.jsonl") == evaluated[:2], "rows after the checkpoint are dropped"

    if zero == 1:
        again = train_tiny(world, ep, zero, directory=interrupted, **changes)
        assert "already trained on" in again.output and again.metrics == read_metrics(interrupted)


@pytest.mark.slow
def test_ema_follows_the_weights_and_thresholds_are_copied(train_tiny):
    """ema_k = d ema_(k-1) + (1 - d) w_k, from the checkpoints of every step."""
    run = train_tiny(
        2, 2, 2, "run.save_every_images=16", "checkpoint.keep_last=0", "ema.decay=0.75", "ema.warmup=false"
    )
    every = [CheckpointReader(p) for p in sorted((run.directory / "checkpoints").glob("images_*"))]
    assert len(every) == 5
    for name, shape in every[0].metadata.shapes.items():
        numel = torch.Size(shape).numel()
        for before, after in pairwise(every):
            expected = 0.75 * before.read("ema", name, 0, numel) + 0.25 * after.read("fp32", name, 0, numel)
            torch.testing.assert_close(after.read("ema", name, 0, numel), expected, atol=1e-6, rtol=1e-5)


LAYOUTS = ((1, 1, 0), (2, 2, 1), (2, 1, 2), (2, 2, 3), (4, 2, 2), (4, 4, 3))
RING = [(layout, LAYOUTS[(number + 1) % len(LAYOUTS)]) for number, layout in enumerate(LAYOUTS)]
"""Each layout is resumed from once and resumed in once."""


@pytest.mark.parametrize(
    "pairs",
    (
        pytest.param(RING, id="ring", marks=pytest.mark.slow),
        pytest.param(list(permutations(LAYOUTS, 2)), id="all", marks=(pytest.mark.slow, pytest.mark.long)),
    ),
)
def test_every_layout_resumes_from_every_other(train_tiny, tmp_path, pairs):
    """3 steps in one layout and 3 in another give the losses, weights, moments, EMA and thresholds of 6 in one."""
    assert {before for before, _ in pairs} == {after for _, after in pairs} == set(LAYOUTS)
    length = "run.total_images=96"
    straight = train_tiny(1, 1, 0, length)
    halves = {layout: train_tiny(*layout, "run.total_images=48").directory for layout in LAYOUTS}
    for number, (before, after) in enumerate(pairs):
        directory = shutil.copytree(halves[before], tmp_path / f"moved_{number}")
        moved = train_tiny(*after, length, directory=directory)
        assert "at 48 images, resharding: " in moved.output, (before, after)
        assert_same(moved, straight)


@pytest.mark.slow
@pytest.mark.long
def test_torchs_and_deepspeeds_adam_continue_each_other(train_tiny, tmp_path):
    """On other layouts, too: both keep the same moments and step count."""
    pytest.importorskip("deepspeed.ops.op_builder").CPUAdamBuilder().load()  # compiles for minutes, once

    def settings(torch_adam: bool, zero: int) -> dict:
        offload = {"stage": zero, "offload_optimizer": {"device": "cpu"}}
        optimizer = {"type": "AdamW", "params": {"torch_adam": torch_adam}}
        return {"optimizer": optimizer, "zero_optimization": offload, "zero_force_ds_cpu_optimizer": False}

    straight = train_tiny(1, 1, 1, "run.total_images=96", **settings(True, 1))
    for first, before, after in ((True, (2, 2, 2), (2, 1, 3)), (False, (2, 1, 3), (1, 1, 1))):
        directory = tmp_path / f"torch_first_{first}"
        train_tiny(*before, "run.total_images=48", directory=directory, **settings(first, before[2]))
        moved = train_tiny(*after, "run.total_images=96", directory=directory, **settings(not first, after[2]))
        assert "at 48 images, resharding: " in moved.output
        assert_same(moved, straight)


def lion(zero: int) -> dict:
    return {
        "optimizer": {"type": "Lion", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": zero, "offload_optimizer": {"device": "cpu"}},
    }


@pytest.mark.slow
@pytest.mark.long  # compiles an operator
def test_lion_resumes_and_reshards_like_adam(train_tiny, tmp_path):
    """In its own layout bit for bit, in others within the tolerance; never with the moments of another optimizer."""
    pytest.importorskip("deepspeed.ops.op_builder").CPULionBuilder().load()  # compiles for minutes, once
    straight = train_tiny(1, 1, 2, "run.total_images=96", **lion(2))
    assert straight.column("loss")[-1] < straight.column("loss")[0]
    half = train_tiny(2, 2, 1, "run.total_images=48", **lion(1))
    copies = [shutil.copytree(half.directory, tmp_path / f"moved_{number}") for number in range(3)]
    same = train_tiny(2, 2, 1, "run.total_images=96", directory=half.directory, **lion(1))
    unbroken = train_tiny(2, 2, 1, "run.total_images=96", **lion(1))
    ours, theirs = tensors(same), tensors(unbroken)
    assert same.column("loss") == unbroken.column("loss")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(name.startswith("exp_avg_sq") for name in ours) and any(name.startswith("exp_avg/") for name in ours)

    out = tmp_path / "resharded"
    assert main(["checkpoint", "reshard", str(copies[0]), "--world", "4", "--ep", "2", "--out", str(out)]) == 0
    assert CheckpointReader(out).kinds() == ["buffer", "ema", "exp_avg", "fp32"]
    for directory, layout in zip(copies, ((2, 1, 3), (1, 1, 1)), strict=False):
        moved = train_tiny(*layout, "run.total_images=96", directory=directory, **lion(layout[2]))
        assert "at 48 images, resharding: " in moved.output
        assert_same(moved, straight, key_biases=False)
    refused = train_tiny(1, 1, 1, "run.total_images=96", directory=copies[2], code=5)
    assert "has the moments of Lion, but optimizer.type is AdamW; set Lion, or start a new run" in refused.output


@pytest.mark.slow
def test_batch_sizes_and_ranks_may_change_on_resume(train_tiny, tmp_path):
    """Resume with 4 x 4 images per rank, then 1 x 16: the pools and losses change, but the image count continues."""
    directory = tmp_path / "run"
    train_tiny(2, 2, 1, "run.total_images=32", directory=directory)
    train_tiny(1, 1, 0, "run.total_images=64", directory=directory, gradient_accumulation_steps=4)
    last = train_tiny(2, 1, 3, "run.total_images=128", directory=directory, train_batch_size=32)
    assert last.column("images") == [16, 32, 48, 64, 96, 128]
    assert "global_batch 16 -> 32" in last.output and "accumulation 4 -> 1" in last.output


@pytest.mark.slow
def test_a_new_run_starts_from_an_exported_model(train_tiny, tmp_path):
    """Fine-tuning: after a step with a tiny learning rate, the weights are the exported ones."""
    source = train_tiny(1, 1, 1, "run.total_images=48")
    assert main(["checkpoint", "export", str(source.directory), "--out", str(tmp_path / "model")]) == 0
    tuned = train_tiny(2, 2, 2, f"model.init_from={tmp_path / 'model'}", "run.total_images=16", "optimizer.lr=1e-12")
    assert "starting from the weights of" in tuned.output
    exported, first = ModelFileReader(tmp_path / "model"), tensors(tuned)
    for name in CheckpointReader(newest_valid(tuned.directory, full=True)).metadata.shapes:
        expected = exported.read("ema", name, 0, first[f"fp32/{name}"].numel())
        assert torch.allclose(first[f"fp32/{name}"], expected, atol=1e-9)
    wrong = train_tiny(1, 1, 1, "model.init_from=/nowhere", code=5)
    assert "model.init_from /nowhere: not a checkpoint" in wrong.output


def dry_run(tmp_path, capsys, directory, *overrides, options=(), zero=1, **changes):
    """(exit code, output) of a dry run in this process."""
    config = write_json(tmp_path / "dry.json", ep=1, zero=zero, **changes)
    capsys.readouterr()
    code = main(["train", *training_arguments(config, directory, *overrides, options=("--dry-run", *options))])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.slow
def test_foreign_checkpoints_are_refused(train_tiny, tmp_path, capsys):
    """Also in a dry run if a single process can detect it; ``resolved.yaml`` is never changed."""
    run = train_tiny(1, 1, 1, "run.total_images=16")
    resolved = (run.directory / "resolved.yaml").read_text()
    assert "gradient_clipping: 0.5" in resolved
    for override, message in (
        ("model.depth=2", "belongs to another model: model.depth is 4 there and 2 here"),
        (
            "model.label_dropout=0",
            "belongs to another model: model.label_dropout (zero or positive) is 0.1 there and 0.0 here",
        ),
    ):
        code, printed = dry_run(tmp_path, capsys, run.directory, override)
        assert code == 5 and message in printed
    assert dry_run(tmp_path, capsys, run.directory, "model.label_dropout=0.2")[0] == 0
    code, printed = dry_run(tmp_path, capsys, run.directory, options=("--resume", "none"))
    assert code == 5 and "--resume none would mix" in printed

    path = newest_valid(run.directory, full=True)
    meta = json.loads((path / META).read_text())
    meta["shapes"]["t_embedder.mlp.0.bias"] = [2, 16]  # the pieces still fit
    reseal(path, meta)
    other = train_tiny(1, 1, 1, "run.seed=5", directory=run.directory, code=5)
    assert "'t_embedder.mlp.0.bias' has shape (2, 16)" in other.output and "Traceback" not in other.output
    assert (run.directory / "resolved.yaml").read_text() == resolved


@pytest.mark.slow
def test_the_banner_lists_changes_to_the_deepspeed_json(train_tiny, tmp_path, capsys):
    run = train_tiny(1, 1, 0, "run.total_images=16")
    assert "changed since" not in dry_run(tmp_path, capsys, run.directory, "run.total_images=16", zero=0)[1]
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.1}}
    changes = {"bf16": {"enabled": True}, "gradient_clipping": 1, "optimizer": optimizer}
    code, printed = dry_run(tmp_path, capsys, run.directory, "run.total_images=16", zero=2, **changes)
    expected = "resharding: zero_stage 0 -> 2; changed since it was saved: "
    expected += "deepspeed.optimizer.params.weight_decay 0.0 -> 0.1, deepspeed.gradient_clipping 0.5 -> 1.0, "
    expected += "deepspeed.bf16.enabled False -> True\n"
    assert code == 0 and expected in printed


@pytest.mark.slow
def test_the_same_command_resumes_from_the_newest_checkpoint(train_tiny, tmp_path, capsys):
    """After --resume PATH goes back from 48 images to 16 and trains to 32, the next start resumes at 32, not at 16."""
    run = train_tiny(1, 1, 1, "run.save_every_images=16", "run.total_images=48")
    path = run.directory / "checkpoints" / "images_000000000016"
    resume = ("--resume", str(path))
    code, printed = dry_run(tmp_path, capsys, run.directory, options=resume)
    assert code == 0 and f"continues {path} at 16 images" in printed
    again = train_tiny(1, 1, 1, "run.total_images=32", directory=run.directory, options=resume)
    left = "left-images_000000000032, left-images_000000000048: from an abandoned branch"
    assert left in again.output and again.column("images") == [16, 32]
    code, printed = dry_run(tmp_path, capsys, run.directory, options=resume)
    newest = run.directory / "checkpoints" / "images_000000000032_2"
    assert code == 0 and f"continues {newest} at 32 images, begun with --resume {path}" in printed
    code, printed = dry_run(tmp_path, capsys, tmp_path / "new", options=resume)
    assert code == 0 and f"continues {path} at 16 images" in printed and "begun" not in printed
    other = path.parent / "left-images_000000000048"
    code, printed = dry_run(tmp_path, capsys, run.directory, options=("--resume", str(other)))
    assert code == 0 and f"continues {other} at 48 images" in printed

    # started from another run, which may have been deleted since; a third run is refused
    meta = json.loads((newest / META).read_text())
    reseal(newest, {**meta, "began_from": str(tmp_path / "gone")})
    code, printed = dry_run(tmp_path, capsys, run.directory, options=("--resume", f"{tmp_path / 'gone'}/"))
    assert code == 0 and f"continues {newest} at 32 images" in printed
    third = shutil.copytree(run.directory, tmp_path / "third")
    code, printed = dry_run(tmp_path, capsys, run.directory, options=("--resume", str(third)))
    assert code == 5 and "contains checkpoints of an earlier run" in printed


WHOLE_EPOCH = ((1, 48, 0), (2, 48, 1), (4, 48, 0), (3, 96, 0))
"""(ranks, images until the next resume, loader workers)."""


@pytest.mark.slow
def test_every_image_of_an_epoch_is_seen_exactly_once(tmp_path):
    """240 images, three resumes, on 1, 2, 4 and 3 ranks; every rank records the keys it trains on."""
    shard = numbered_shard(tmp_path / "shard.tar", 240)
    total = 0
    for ranks, images, workers in WHOLE_EPOCH:
        total += images
        config = write_json(tmp_path / "ds.json", ep=1, zero=1, train_batch_size=24)
        overrides = [f"data.path={shard}", f"data.num_workers={workers}", f"run.total_images={total}"]
        arguments = training_arguments(config, tmp_path / "run", *overrides)
        worker = [str(WORKERS / "record_keys.py"), str(tmp_path / "keys"), "train", *arguments]
        finished = run_ranks(ranks, worker)
        assert finished.code == 0, finished.output
    keys = [key for file in sorted((tmp_path / "keys").iterdir()) for key in file.read_text().split()]
    assert sorted(keys) == [f"{number:04d}" for number in range(240)]
