"""On a GPU: the commands train in bf16, resume and sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers.processes import run_ranks
from tests.helpers.training import read_metrics, training_arguments, write_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2"}
STEPS = 6
ROUTINGS = ("per_token", "dynamic", "static")


def train(directory, images):
    """Train in bf16 up to ``images`` images and return the metrics."""
    config = write_json(directory.with_suffix(".json"), 1, 1, bf16={"enabled": True})
    arguments = training_arguments(config, directory, f"run.total_images={images}")
    finished = run_ranks(1, ["-m", "diffmoe_ds.cli", "train", *arguments], **GPU)
    assert finished.code == 0, finished.output
    return read_metrics(directory)


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """A run of six steps that was interrupted after three, with its metrics."""
    directory = tmp_path_factory.mktemp("gpu") / "resumed"
    assert len(train(directory, STEPS // 2 * 16)) == STEPS // 2
    return directory, train(directory, STEPS * 16)


def test_bf16_training_saves_and_resumes(resumed_run, tmp_path):
    """GPU kernels may add in another order from run to run, so losses agree to the precision of bf16 only."""
    resumed, straight = resumed_run[1], train(tmp_path / "straight", STEPS * 16)
    assert [row["step"] for row in resumed] == [row["step"] for row in straight] == list(range(1, STEPS + 1))
    for ours, expected in zip(resumed, straight, strict=True):
        assert all(math.isfinite(ours[key]) for key in ("loss", "grad_norm", "images_per_s"))
        assert ours["loss"] == pytest.approx(expected["loss"], rel=0.03), ours["step"]
        assert ours["peak_memory_mb"] > 0


@pytest.mark.parametrize("routing", ROUTINGS)
def test_sampling(resumed_run, routing, tmp_path):
    arguments = ["--checkpoint", str(resumed_run[0]), "--num-images", "8", "--steps", "4", "--routing", routing]
    finished = run_ranks(1, ["-m", "diffmoe_ds.cli", "sample", *arguments, "--out", str(tmp_path)], **GPU)
    assert finished.code == 0, finished.output
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape[:1] == file["arr_1"].shape == (8,)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].std() > 0
