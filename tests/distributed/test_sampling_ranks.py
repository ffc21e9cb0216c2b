"""``diffmoe sample`` on several ranks: an error in any phase is reported once, and all ranks exit with its code."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.processes import run_ranks


@pytest.mark.slow
def test_errors_are_reported_once_and_images_come_in_order(train_tiny, tmp_path):
    trained = train_tiny(1, 1, 0).directory
    out = tmp_path / "out"
    (tmp_path / "file").touch()

    def sample(world: int, *options: str, code: int = 0) -> str:
        arguments = [
            "-m",
            "diffmoe_ds.cli",
            "sample",
            "--checkpoint",
            str(trained),
            "--num-images",
            "5",
            "--steps",
            "2",
        ]
        finished = run_ranks(world, [*arguments, "--out", str(out), *options], timeout=120)
        assert finished.code == code, finished.output
        return finished.output

    for options, code, message in (
        (("--checkpoint", "/nowhere"), 5, "--checkpoint /nowhere: not a checkpoint, run directory or exported model"),
        (("--routing", "dynamo"), 2, "did you mean 'dynamic'?"),
        (("--out", str(tmp_path / "file" / "out")), 5, "cannot create the directory"),
        (("--cfg-scale", "1e38"), 3, "the generated images contain NaN or Inf"),
    ):
        output = sample(2, *options, code=code)
        assert output.count(message) == 1 and "Traceback" not in output, output
    assert not list(out.glob("*.npz"))

    per_token = ("--routing", "per_token", "--batch-size", "2")
    sample(2, *per_token)
    with np.load(out / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [0, 1, 2, 3, 4] and labels.dtype == np.int64
    sample(1, *per_token)
    with np.load(out / "samples.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - images).max() <= 1
