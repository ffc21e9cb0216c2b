"""Arguments and results of ``diffmoe sample``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffmoe_ds.cli import main


def sample(trained: Path, out: Path, *options: str) -> np.ndarray:
    """Generate images with three steps in this process; return them as uint8 [N, H, W, C]."""
    arguments = ["sample", "--checkpoint", str(trained), "--steps", "3", "--out", str(out), *options]
    assert main(arguments) == 0
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 1) and labels.dtype == np.int64
    assert (out / "grid.png").is_file() and {p.name for p in out.iterdir()} == {"samples.npz", "grid.png"}
    return images
