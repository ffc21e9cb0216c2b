"""REPA: the alignment loss, what it needs of the data, and what it leaves as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_ds.checkpoint.export import ModelFileReader
from diffmoe_ds.checkpoint.load import PROJECTOR, CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.dataset import open_dataset, with_features
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.training.loss import alignment_loss
from tests.helpers.data import FEATURES, captioned_shard, image_file
from tests.helpers.training import SMALLEST_MODEL, read_metrics, training_arguments

REPA = ("loss.repa_weight=0.5", "loss.repa_hidden=8")
BASE = (
    *SMALLEST_MODEL, "run.total_images=32", "run.log_every_images=16", "run.sample_every_images=32", "sample.steps=2",
    "sample.num_images=4", "deepspeed.train_batch_size=16", "optimizer.lr=1e-3", "model.num_classes=auto",
)  # fmt: skip


def train(directory: Path, *overrides: str, dry: bool = False) -> int:
    options = ("--dry-run",) if dry else ()
    return main(["train", *training_arguments(None, directory, *overrides, base=BASE, options=options)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs on images with features, `on` with REPA and `off` without, and one on images without features."""
    folder = tmp_path_factory.mktemp("repa")
    images = captioned_shard(folder / "a.tar", 24, features=FEATURES)
    plain = captioned_shard(folder / "plain.tar", 24)
    held_out = (f"data.validation_path={captioned_shard(folder / 'held.tar', 5)}", "eval.every_images=32")
    assert train(folder / "on", f"data.path={images}", *REPA, *held_out) == 0
    assert train(folder / "off", f"data.path={images}", *held_out) == 0
    assert train(folder / "none", f"data.path={plain}", *held_out) == 0
    return folder


def reader(run: Path) -> CheckpointReader:
    return CheckpointReader(newest_valid(run, full=True))


def weights(run: Path, kind: str = "fp32") -> dict[str, torch.Tensor]:
    found = reader(run)
    return {name: found.read(kind, name, 0, torch.Size(shape).numel()) for name, shape in found.metadata.shapes.items()}


def test_the_loss_is_the_mean_negative_cosine():
    torch.manual_seed(0)
    projected, features = torch.randn(3, 16, 6, requires_grad=True), torch.randn(3, 16, 6).half()
    loss = alignment_loss(projected, features)
    sides = features.float()
    cosine = (projected * sides).sum(-1) / (projected.norm(dim=-1) * sides.norm(dim=-1))
    torch.testing.assert_close(loss, -cosine.mean())
    loss.backward()
    assert projected.grad.norm() > 0
    torch.testing.assert_close(alignment_loss(features.float(), features), torch.tensor(-1.0))
    torch.testing.assert_close(alignment_loss(-2 * features.float(), features), torch.tensor(1.0))


@pytest.mark.parametrize(("grid", "side"), [(2, 4), (7, 4), (4, 2)])
def test_features_are_resized_to_the_grid_of_the_tokens(grid, side):
    """Also in their place: a map that grows from left to right still does so after resizing."""
    columns = torch.arange(grid).float().repeat(grid)
    features = torch.stack([columns, torch.ones(grid * grid)], dim=-1)[None].half()
    found = torch.nn.functional.interpolate(
        columns.view(1, 1, grid, grid), (side, side), mode="bilinear", antialias=True
    ).flatten()
    assert (found.view(side, side).diff(dim=1) > 0).all() and found.view(side, side).diff(dim=0).abs().max() < 1e-5
    projected = torch.stack([found, torch.ones(side * side)], dim=-1)[None]
    torch.testing.assert_close(alignment_loss(projected, features), torch.tensor(-1.0))
    torch.testing.assert_close(
        alignment_loss(projected.flip(1), features), -F.cosine_similarity(projected.flip(1), projected, dim=-1).mean()
    )


def test_the_loss_trains_the_blocks_up_to_the_aligned_one():
    overrides = [*SMALLEST_MODEL, *REPA, "loss.repa_features=[2,6]", "loss.repa_block=2"]
    model = DiT(load_config("fashion", overrides)).train()
    init_weights(model, seed=0)
    inputs = torch.randn(2, 1, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    aligned_BSF = model(*inputs).aligned_BSF
    assert aligned_BSF.shape == (2, 16, 6)
    alignment_loss(aligned_BSF, torch.randn(2, 4, 6).half()).backward()
    trained = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
    assert trained == [True, True, False, False] and model.x_embedder.proj.weight.grad.norm() > 0
    assert model.eval()(*inputs).aligned_BSF is None


def test_without_repa_features_change_nothing(runs):
    off, none, on = (read_metrics(runs / name) for name in ("off", "none", "on"))
    for one, other in zip(off, none, strict=True):
        assert {key: one[key] for key in ("loss", "diffusion_loss", "grad_norm")} == {
            key: other[key] for key in ("loss", "diffusion_loss", "grad_norm")
        }
        assert "repa_loss" not in one
    ours, theirs = weights(runs / "off"), weights(runs / "none")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert on[0]["diffusion_loss"] == off[0]["diffusion_loss"], "the projector takes no draw of the other weights"
    assert on[0]["loss"] == pytest.approx(off[0]["loss"] + 0.5 * on[0]["repa_loss"], abs=1e-6)
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in weights(runs / "on").items() if name in ours)


def test_the_configuration_takes_the_shape_of_the_set(runs, tmp_path):
    stored = yaml.safe_load((runs / "on" / "resolved.yaml").read_text())
    assert stored["loss"]["repa_features"] == [2, 6] and reader(runs / "on").config.loss.repa_features == (2, 6)
    off = yaml.safe_load((runs / "off" / "resolved.yaml").read_text())
    assert off["loss"]["repa_features"] == "auto"

    def resolved(path: Path, *overrides: str):
        config = load_config("fashion", [*SMALLEST_MODEL, *REPA, f"data.path={path}", *overrides])
        return with_features(config, open_dataset(config)).loss.repa_features

    assert resolved(runs / "a.tar") == resolved(runs / "a.tar", "loss.repa_features=[2,6]") == (2, 6)
    with pytest.raises(
        ConfigError, match=r"^loss.repa_features is \[3, 6\], but the image features of .* are \[2, 6\]"
    ):
        resolved(runs / "a.tar", "loss.repa_features=[3,6]")
    message = r"{} has no image features, which loss.repa_weight 0.5 needs; prepare the images with `diffmoe prepare la"
    with pytest.raises(DataError, match=message.format(runs / "plain.tar")):
        resolved(runs / "plain.tar")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_file(np.zeros((28, 28), np.uint8)))
    with pytest.raises(DataError, match=message.format(tmp_path / "images")):
        resolved(tmp_path / "images")


def test_a_run_does_not_switch(runs, tmp_path, capsys):
    for name, overrides, message in (
        ("off", REPA, "loss.repa_weight (zero or positive) is 0.0 there and 0.5 here"),
        ("on", (), "loss.repa_weight (zero or positive) is 0.5 there and 0.0 here"),
        ("on", (*REPA, "loss.repa_hidden=4"), "loss.repa_hidden is 8 there and 4 here"),
    ):
        run = shutil.copytree(runs / name, tmp_path / f"{name}-{len(overrides)}")
        capsys.readouterr()
        assert train(run, f"data.path={runs / 'a.tar'}", *overrides, dry=True) == 5
        assert message in capsys.readouterr().err
    run = shutil.copytree(runs / "on", tmp_path / "weight")
    changed = (f"data.path={runs / 'a.tar'}", *REPA, "loss.repa_weight=0.1", "run.total_images=48")
    assert train(run, *changed, dry=True) == 0


def test_a_run_resumes_with_its_network_only(runs, tmp_path, capsys):
    """Also if another network has features of the same shape; not if the same one has moved."""
    run = shutil.copytree(runs / "on", tmp_path / "run")
    longer = (*REPA, "run.total_images=48")
    moved = captioned_shard(tmp_path / "moved.tar", 24, features=replace(FEATURES, name="elsewhere/tiny"))
    assert train(run, f"data.path={moved}", *longer, dry=True) == 0
    other = captioned_shard(tmp_path / "other.tar", 24, features=replace(FEATURES, name="large", sha256="ef" * 32))
    capsys.readouterr()
    assert train(run, f"data.path={other}", *longer, dry=True) == 5
    message = (
        "was trained with image features of tiny (SHA-256 cdcdcdcdcdcd), but those of data.path are of large (SHA-256 "
        "efefefefefef); prepare the images with the same --features."
    )
    assert message in capsys.readouterr().err
    assert [reader(runs / name).metadata.repa_network for name in ("on", "off")] == [("tiny", "cd" * 32), None]
    start = (f"model.init_from={run}", f"data.path={other}", "run.total_images=16")
    assert train(tmp_path / "tuned", *start, *REPA, dry=True) == 0, "a new run may"


@pytest.mark.parametrize(("source", "overrides"), [("off", REPA), ("on", ())])
def test_a_new_run_may_switch_and_keeps_the_other_weights(runs, tmp_path, source, overrides):
    start = (f"model.init_from={runs / source}", f"data.path={runs / 'a.tar'}", "run.total_images=16")
    assert train(tmp_path / "tuned", *start, *overrides, "optimizer.lr=1e-12") == 0
    before, after = weights(runs / source, "ema"), weights(tmp_path / "tuned")
    assert any(name.startswith(PROJECTOR) for name in after) == bool(overrides)
    for name, tensor in after.items():
        if not name.startswith(PROJECTOR):
            assert torch.allclose(tensor, before[name], atol=1e-9), name


def test_sampling_evaluation_and_exports(runs, tmp_path, capsys):
    checkpoint = str(runs / "on")
    for number, name in enumerate(("checkpoint", "exported")):
        sample = ["sample", "--checkpoint", checkpoint, "--num-images", "2", "--steps", "2"]
        assert main([*sample, "--out", str(tmp_path / name)]) == 0
        if not number:
            assert main(["checkpoint", "export", checkpoint, "--out", str(tmp_path / "model")]) == 0
            checkpoint = str(tmp_path / "model")
    one, other = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("checkpoint", "exported"))
    assert (one == other).all()
    assert ModelFileReader(tmp_path / "model").config.loss.repa_features == (2, 6)
    rows = read_metrics(runs / "on", "validation.jsonl")
    assert rows[-1]["validation_images"] == 5, "held-out images need no features"
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", checkpoint, "--validation", str(runs / "held.tar"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation_loss"] == pytest.approx(
        rows[-1]["validation_loss"], rel=1e-4
    )
    folder = tmp_path / "diffusers"
    assert main(["checkpoint", "export", checkpoint, "--format", "diffusers", "--out", str(folder)]) == 0
    with safe_open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names and not any(name.startswith(PROJECTOR) for name in names)


def test_plans_count_the_projector_in_training_only(capsys):
    overrides = ("model.name=tiny-E8", "loss.repa_hidden=24")
    plain = load_config("imagenet-256", overrides)
    config = load_config("imagenet-256", [*overrides, "loss.repa_weight=0.5", "loss.repa_features=[4,10]"])
    projector = sum(p.numel() for p in DiT(config).repa_projector.parameters())
    before, after = count_parameters(plain), count_parameters(config)
    assert (after.total, after.touched) == (before.total + projector, before.touched + projector)
    assert (after.activated, after.ffn, after.projector) == (before.activated, before.ffn, projector)
    assert flops_per_image(config).forward == flops_per_image(plain).forward
    tokens = torch.randn(1, config.tokens_per_image, config.size.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        DiT(config).repa_projector(tokens).sum().backward()
    assert flops_per_image(config).training - flops_per_image(plain).training == counter.get_total_flops()
    command = ["plan", "--model", "nano-E4", "--world", "2", "--micro-batch", "2", "--json", "--set"]
    assert main([*command, "loss.repa_weight=0.5", "model.num_classes=10"]) == 0
    assert json.loads(capsys.readouterr().out)["assumed"] == {"loss.repa_features": [16, 768]}
