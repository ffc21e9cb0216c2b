"""Layout invariance: a global batch gives the same losses and weights for any world size, EP size and ZeRO stage."""

from __future__ import annotations

import pytest
import torch

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from tests.helpers.data import numbered_shard
from tests.helpers.training import Trained, read_metrics

TOLERANCE = 1e-5
ZERO = {(2, 2, 1): {"overlap_comm": True}, (4, 2, 2): {"use_multi_rank_bucket_allreduce": False}}
"""ZeRO settings of some layouts that change how gradients are reduced, but not the gradients."""
LAYOUTS = ((2, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 2, 2), (4, 4, 1), (4, 4, 3))
KEYS = ("loss", "diffusion_loss", "capacity_loss", "grad_norm")


def tensors(run: Trained) -> dict[str, torch.Tensor]:
    """Every full tensor of the run's last checkpoint: weights, moments, EMA, thresholds and biases."""
    reader = CheckpointReader(newest_valid(run.directory, full=True))
    found = {}
    for name, shape in reader.metadata.shapes.items():
        for kind in ("fp32", *MOMENTS[reader.metadata.optimizer], "ema"):
            found[f"{kind}/{name}"] = reader.read(kind, name, 0, torch.Size(shape).numel())
    buffers = {f"buffer/{name}": reader.read("buffer", name, 0, numel) for name, numel in reader.buffers().items()}
    assert any("expert_threshold" in name for name in buffers) == reader.config.has_capacity_predictor
    return found | buffers


def assert_same(run: Trained, reference: Trained, tolerance: float = TOLERANCE, key_biases: bool = True) -> None:
    """Compare logs and tensors of two runs.

    Without `key_biases`, those of the attention's keys may differ: the softmax does not depend on them, so their
    gradients are rounding errors, of which Lion takes the sign.
    """
    for key in KEYS:
        assert run.column(key) == pytest.approx(reference.column(key), abs=tolerance), key
    ours, theirs = tensors(run), tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).abs()
        if not key_biases and name.endswith("attn.qkv.bias"):
            difference.view(3, -1)[1] = 0
        assert difference.max() <= tolerance, name


@pytest.mark.slow
def test_every_layout_trains_the_same(train_tiny):
    reference = train_tiny(1, 1, 0)
    assert len(reference.metrics) == 5
    assert reference.column("loss")[-1] < reference.column("loss")[0]
    for world, ep, zero in LAYOUTS:
        settings = {"stage": zero, **ZERO.get((world, ep, zero), {})}
        assert_same(train_tiny(world, ep, zero, zero_optimization=settings), reference)


def test_two_ranks_train_like_one(train_tiny, tmp_path):
    """The fast one, with SwiGLU and a shared expert: EP 2, ZeRO 2 and activation checkpointing against one rank.

    The validation losses agree as well; two ranks divide 21 held-out images unevenly.
    """
    held_out = f"data.validation_path={numbered_shard(tmp_path / 'held_out.tar', 21)}"
    swiglu = ("model.mlp=swiglu", "routing.shared_experts=1", "run.total_images=48", "eval.every_images=32", held_out)
    reference = train_tiny(1, 1, 0, *swiglu)
    two = train_tiny(2, 2, 2, *swiglu, "model.activation_checkpointing=true")
    assert_same(two, reference)
    rows = read_metrics(reference.directory, "validation.jsonl")
    assert [(row["step"], row["images"], row["validation_images"]) for row in rows] == [(2, 32, 21), (3, 48, 21)]
    for row, other in zip(rows, read_metrics(two.directory, "validation.jsonl"), strict=True):
        losses = [row["validation_loss"], *row["validation_loss_by_noise_level"]]
        others = [other["validation_loss"], *other["validation_loss_by_noise_level"]]
        assert others == pytest.approx(losses, rel=TOLERANCE)
        assert list(other) == list(row) and other["routing"] == row["routing"] == "per_token"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("token_choice", "expert_choice", "dense"))
def test_other_routers_train_the_same(train_tiny, kind):
    overrides = (f"routing.kind={kind}", "run.total_images=48", "objective.kind=ddpm")
    reference = train_tiny(1, 1, 1, *overrides)
    ep = 1 if kind == "dense" else 2
    assert_same(train_tiny(2, ep, 2, *overrides), reference)


@pytest.mark.slow
def test_accumulated_micro_steps_do_not_depend_on_the_ranks(train_tiny):
    """The pool is one micro-batch over all ranks: 2 x 8 images on one rank are 2 x 4 on two."""
    one = train_tiny(1, 1, 0, gradient_accumulation_steps=2)
    assert_same(train_tiny(2, 2, 2, gradient_accumulation_steps=2), one)
    whole = train_tiny(1, 1, 0)
    assert one.column("loss") != pytest.approx(whole.column("loss"), abs=1e-7), "two pools must not select like one"


@pytest.mark.slow
def test_smaller_pools_span_fewer_ranks(train_tiny):
    """With EP 2 on 4 ranks, an `ep` pool spans two ranks and a `rank` pool one; the losses differ."""
    losses = {pool: train_tiny(4, 2, 2, f"routing.pool={pool}").column("loss") for pool in ("world", "ep", "rank")}
    assert len({tuple(values) for values in losses.values()}) == 3
    one_rank = train_tiny(1, 1, 0, "routing.pool=rank").column("loss")
    assert one_rank == pytest.approx(losses["world"], abs=TOLERANCE), "on one rank all pools are the same"


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(train_tiny):
    fp32 = train_tiny(1, 1, 0)
    for world, ep, zero in ((1, 1, 0), (2, 2, 1), (2, 2, 3)):
        bf16 = train_tiny(world, ep, zero, bf16={"enabled": True})
        assert bf16.column("diffusion_loss") == pytest.approx(fp32.column("diffusion_loss"), rel=0.05)


@pytest.mark.slow
def test_offloaded_optimizer_trains_the_same(train_tiny):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    extra = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    assert_same(train_tiny(2, 2, 2, **extra), train_tiny(2, 2, 2))


@pytest.mark.slow
def test_pools_of_some_images_do_not_depend_on_the_ranks(train_tiny):
    """A pool of 8 images is half of one rank's images, all of them, or those of 2 of 4 ranks, with or without EP."""
    reference = train_tiny(1, 1, 0, "routing.pool_images=8")
    for world, ep, zero in ((2, 2, 1), (4, 2, 2), (4, 4, 3)):
        assert_same(train_tiny(world, ep, zero, "routing.pool_images=8"), reference)
    padded = train_tiny(4, 4, 2, "routing.pool_images=8", "routing.padded_dispatch=1.5")
    assert padded.column("loss") == pytest.approx(reference.column("loss"), abs=TOLERANCE)


@pytest.mark.slow
def test_a_pool_of_one_image_is_expert_choice_and_one_of_all_images_the_default(train_tiny):
    one, half = train_tiny(1, 1, 0, "routing.pool_images=1"), train_tiny(1, 1, 0, "routing.pool_images=8")
    per_image, whole = train_tiny(1, 1, 0, "routing.kind=expert_choice"), train_tiny(1, 1, 0)
    assert one.column("loss") == per_image.column("loss")
    assert train_tiny(1, 1, 0, "routing.pool_images=16").column("loss") == whole.column("loss")
    assert len({tuple(run.column("loss")) for run in (one, half, whole)}) == 3
