"""From photographs to samples through the command line, on two ranks: the complete workflow of a user."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import main as bench_main
from diffmoe_ds.cli import main
from diffmoe_ds.data.vae import VAE
from tests.helpers.data import numbered_shard, photographs, tiny_vae
from tests.helpers.training import Trained, read_metrics

LATENTS = ("model.in_channels=4", "model.input_size=8", "model.patch_size=2", "model.num_classes=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Photographs, a VAE and their latents, 4x8x8."""
    folder = tmp_path_factory.mktemp("made")
    photographs(folder / "photographs", 50, size=40)
    tiny_vae(folder / "vae")
    arguments = ["--images", str(folder / "photographs"), "--vae", str(folder / "vae"), "--size", "32"]
    assert main(["prepare", "latents", *arguments, "--shard-images", "20", "--out", str(folder / "latents")]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [("data.shuffle=feistel",), ("data.shuffle=window", "data.shuffle_window=30")])
def test_latents_train_the_same_on_two_ranks_and_resume_exactly(made, train_tiny, tmp_path, shuffle):
    evaluation = (
        f"data.validation_path={made / 'latents'}", "eval.every_images=48", "eval.num_images=15",
        "eval.metrics=[frechet,recall]", "eval.metric_images=11", f"eval.vae={made / 'vae'}", "sample.steps=2",
    )  # fmt: skip
    data = (f"data.path={made / 'latents'}", *LATENTS, *shuffle, *evaluation)
    alone = train_tiny(1, 1, 1, *data)
    two = train_tiny(2, 2, 1, *data, "data.num_workers=1", "run.save_every_images=32")
    assert two.column("loss") == pytest.approx(alone.column("loss"), abs=1e-5)
    assert validation_losses(two) == pytest.approx(validation_losses(alone), abs=1e-5)
    metrics, others = (read_metrics(run.directory, "validation.jsonl")[-1]["metrics"] for run in (alone, two))
    assert metrics.pop("extractor") == others.pop("extractor") == "efficientnet-lite0"
    assert metrics == pytest.approx(others, rel=1e-3), "pixels may be rounded differently"
    assert metrics["n"] == 11 and metrics["n_reference"] == 50 and metrics["frechet"] > 1
    stopped = tmp_path / "stopped"
    shutil.copytree(two.directory, stopped)
    for folder in (stopped / "checkpoints").iterdir():
        if folder.name not in ("latest", "images_000000000032"):
            shutil.rmtree(folder)
    (stopped / "checkpoints" / "latest").write_text("images_000000000032\n")
    resumed = train_tiny(2, 2, 1, *data, "data.num_workers=1", directory=stopped)
    assert resumed.column("loss") == two.column("loss")


@pytest.mark.slow
def test_raw_images_train_the_same_on_two_ranks(made, train_tiny):
    evaluation = (f"data.validation_path={made / 'photographs'}", "eval.every_images=48", "eval.num_images=15")
    data = (f"data.path={made / 'photographs'}", f"data.vae={made / 'vae'}", *LATENTS, *evaluation)
    alone, two = train_tiny(1, 1, 1, *data), train_tiny(2, 2, 1, *data)
    assert len(alone.metrics) == 5 and two.column("loss") == pytest.approx(alone.column("loss"), abs=1e-5)
    assert validation_losses(two) == pytest.approx(validation_losses(alone), abs=1e-5)


def validation_losses(run: Trained) -> list[float]:
    rows = read_metrics(run.directory, "validation.jsonl")
    assert [row["images"] for row in rows] == [48, 80]
    return [row["validation_loss"] for row in rows]


@pytest.mark.slow
def test_a_damaged_held_out_image_ends_the_run_after_saving(train_tiny, tmp_path):
    """Rank 1 cannot read it; both ranks exit, one reports it, and the same command resumes where they stopped."""
    held_out = numbered_shard(tmp_path / "held_out.tar", 20, damaged=14)
    evaluation = (f"data.validation_path={held_out}", "eval.every_images=32")
    stopped = train_tiny(2, 2, 1, *evaluation, code=4)
    error = "sample '0014' of shard"
    assert stopped.output.count(error) == 1 and "Traceback" not in stopped.output
    numbered_shard(held_out, 20)
    resumed = train_tiny(2, 2, 1, *evaluation, directory=stopped.directory)
    assert "at 32 images" in resumed.output and resumed.column("images") == [16, 32, 48, 64, 80]
    assert [row["images"] for row in read_metrics(resumed.directory, "validation.jsonl")] == [64, 80]


@pytest.mark.slow
def test_samples_of_a_latent_model_are_decoded(made, train_tiny, tmp_path, capsys):
    trained = train_tiny(1, 1, 1, f"data.path={made / 'latents'}", *LATENTS)
    arguments = ["sample", "--checkpoint", str(trained.directory), "--num-images", "5", "--steps", "2", "--out"]
    assert main([*arguments, str(tmp_path / "a"), "--vae", str(made / "vae")]) == 0
    samples = np.load(tmp_path / "a" / "samples.npz")
    assert samples["arr_0"].shape == (5, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    assert Image.open(io.BytesIO((tmp_path / "a" / "grid.png").read_bytes())).mode == "RGB"
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "b")]) == 2
    assert "the model generates latents (4 channels); pass --vae" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_decoding_undoes_the_scaling(made):
    vae = VAE(str(made / "vae"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = vae.decode(latents)
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels, vae._model.decode(latents / 0.5).sample.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--samples", "640"),
            "--samples must be at least 1280 with --batch-size 32, got 640: 20 batches",
        ),
        (("--folder", "/nonexistent"), "--folder /nonexistent is not a directory"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(options, message, capsys):
    assert bench_main([*options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_bench_reports_throughput_ratios_and_memory(tmp_path, capsys):
    arguments = ["--samples", "2500", "--rounds", "1", "--workers", "1", "--memory-samples", "4000"]
    assert bench_main([*arguments, "--folder", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["loaders"]) >= {"diffmoe (reading)", "webdataset pipeline", "DataLoader, one .npz per image"}
    assert all(row["samples_per_s"] > 0 and row["mb_per_s"] > 0 for row in report["loaders"].values())
    assert len(report["ratios"]) == 4 and report["memory"]["peak_mb"] > 0 and not list(tmp_path.iterdir())
