"""``diffmoe sample`` on several ranks: errors are reported once, and sharded experts give the same images."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import sampling
from tests.helpers.processes import run_ranks


@pytest.mark.slow
def test_errors_are_reported_once_and_sharded_experts_give_the_same_images(train_tiny, tmp_path):
    trained = train_tiny(1, 1, 0).directory
    out = tmp_path / "out"
    (tmp_path / "file").touch()

    def sample(*options: str, code: int = 0) -> str:
        arguments = ["sample", "--checkpoint", str(trained), "--num-images", "5", "--steps", "3", "--out", str(out)]
        finished = run_ranks(2, ["-m", "diffmoe_ds.cli", *arguments, *options], timeout=120)
        assert finished.code == code, finished.output
        return finished.output

    def images(routing: str, *options: str) -> np.ndarray:
        """Return what one process generates."""
        return sampling.sample(trained, tmp_path / "one", "--routing", routing, *options)

    for options, code, message in (
        (("--checkpoint", "/nowhere"), 5, "--checkpoint /nowhere: not a checkpoint, run directory or exported model"),
        (("--routing", "dynamo"), 2, "did you mean 'dynamic'?"),
        (("--out", str(tmp_path / "file" / "out")), 5, "cannot create the directory"),
        (("--cfg-scale", "1e38", "--experts", "sharded"), 3, "the generated images contain NaN or Inf"),
    ):
        output = sample(*options, code=code)
        assert output.count(message) == 1 and "Traceback" not in output, output
    assert not list(out.glob("*.npz"))

    # three images a rank, the last of which is a further seed: batches of two and of one
    sharded = ("--experts", "sharded", "--batch-size", "2", "--cfg-scale", "2")
    assert "2 of 4 on each rank" in sample("--routing", "per_token", *sharded)
    with np.load(out / "samples.npz") as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [0, 1, 2, 3, 4] and labels.dtype == np.int64
    alone = images("per_token", "--num-images", "5", "--cfg-scale", "2")
    assert np.abs(alone.astype(int) - pixels).max() <= 1

    guided = ("--autoguidance", str(trained), "--weights", "raw", "--guidance-interval", "0.2", "0.9")
    sample("--sampler", "sde", *sharded, *guided)
    with np.load(out / "samples.npz") as file:
        autoguided = file["arr_0"]
    alone = images("per_token", "--num-images", "5", "--cfg-scale", "2", "--sampler", "sde", *guided)
    assert np.abs(alone.astype(int) - autoguided).max() <= 1

    # the images of a rank's batch compete, not those of both ranks: as if the other rank did not exist
    sample("--routing", "static", *sharded)
    with np.load(out / "samples.npz") as file:
        pixels = file["arr_0"]
    first = images("static", "--num-images", "3", "--batch-size", "2", "--cfg-scale", "2")
    second = images("static", "--num-images", "3", "--batch-size", "2", "--cfg-scale", "2", "--seed", "3")
    alone = np.concatenate([first, second])[:5]
    assert np.abs(alone.astype(int) - pixels).max() <= 1
