"""Arguments and results of ``diffmoe sample``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffmoe_ds.checkpoint.description import Description
from diffmoe_ds.checkpoint.export import write_model
from diffmoe_ds.checkpoint.stream import Entry
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.text_features import TextFormat


def sample(trained: Path, out: Path, *options: str) -> np.ndarray:
    """Generate images with three steps in this process; return them as uint8 [N, H, W, C]."""
    arguments = ["sample", "--checkpoint", str(trained), "--steps", "3", "--out", str(out), *options]
    assert main(arguments) == 0
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 1) and labels.dtype == np.int64
    assert (out / "grid.png").is_file() and {p.name for p in out.iterdir()} == {"samples.npz", "grid.png"}
    return images


def write_random_model(
    folder: Path,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    text: TextFormat | None = None,
) -> Path:
    """Export a tiny model of Fashion-MNIST with random weights, whose images depend on their class; return its folder.

    A model that was trained for a few steps still predicts nearly 0, whatever the class. With text encoders, it is a
    text model.
    """
    if text is not None:
        shapes = [[encoder.tokens, encoder.width, encoder.pooled] for encoder in text.encoders]
        overrides = [*overrides, "model.conditioning=text", f"model.text_encoders={shapes}"]
    model = random_model(load_config("fashion", ["model.name=nano-E4", "model.patch_size=8", *overrides]), text, seed)
    entries = [Entry(name, tuple(t.shape), torch.float32, [t]) for name, t in model.state_dict().items()]
    write_model(folder, entries, Description(model.config, class_names, text), "ema", images=16)
    return folder


@torch.no_grad()
def random_model(config: Config, text: TextFormat | None = None, seed: int = 0) -> DiT:
    """Return a model whose weights are all random: `init_weights` would zero its output."""
    torch.manual_seed(seed)
    model = DiT(config)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape))
    for layer in model.moe_layers().values():
        if layer.capacity_predictor is not None:
            layer.expert_threshold.fill_(0.5)
    if text is not None:
        model.y_embedder.null_row.copy_(torch.from_numpy(text.null_row))
    return model.eval()
