"""Draw images with a trained model: the same image for the same seed, whoever draws it and with whom.

Legend: N images, B images of a batch, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.rng import image_stream
from diffmoe_ds.sampling.samplers import guided, sample

PIXEL_CHANNELS = (1, 3)
"""A model with so many channels draws pixels; any other draws latents that a VAE must decode."""


def check_guidance(cfg_scale: float, guide_channels: int | str, config: Config) -> None:
    """ConfigError if a model cannot be guided like that."""
    channels = config.model.in_channels
    if cfg_scale != 1 and config.model.label_dropout == 0:
        raise ConfigError(
            f"the guidance scale (sample.cfg_scale or --cfg-scale) is {cfg_scale}, but a model trained with "
            "model.label_dropout 0 can only do 1."
        )
    if guide_channels != "all" and not 1 <= guide_channels <= channels:
        raise ConfigError(f"--guide-channels is {guide_channels}; valid: all, or 1 to {channels}.")


@torch.no_grad()
def draw(
    model: DiT,
    label_B: Tensor,
    seeds: Sequence[int],
    *,
    sampler: str,
    steps: int,
    cfg_scale: float = 1.0,
    guide_channels: int | str = "all",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one batch.

    Args:
        model: in eval mode.
        label_B: int64 labels, on the model's device.
        seeds: one per image; all noise of an image comes from its own stream.
        sampler: a sampler of the model's objective.
        steps: sampler steps.
        cfg_scale: guidance scale; 1 is without guidance.
        guide_channels: channels that DDPM guidance acts on; the reference takes the first 3.
        progress: called after each step with (steps done, steps).

    Returns:
        fp32 [B, C, H, W] on the model's device, pixels in about [-1, 1] or latents.
    """
    config = model.config
    device = label_B.device
    side = config.model.input_size
    streams = [image_stream(seed) for seed in seeds]

    def noise() -> Tensor:
        shape = (config.model.in_channels, side, side)
        fresh = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
        return torch.from_numpy(fresh).to(device)

    kind = make_objective(config.objective.kind).kind
    model_fn = guided(
        lambda x, t, y: model(x, t, y).prediction,
        label_B,
        model.y_embedder.null_like(label_B),
        cfg_scale,
        kind,
        config.model.in_channels,
        guide_channels=guide_channels,
    )
    return sample(model_fn, sampler, noise(), steps, noise_fn=noise, progress=progress)


def to_uint8(images_NCHW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] to uint8 [N, H, W, C]."""
    scaled = (images_NCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid_columns(num_images: int, num_classes: int) -> int:
    """Columns of a grid: one per class if they are few, since labels go round; otherwise nearly square."""
    return num_classes if num_classes <= 16 else math.ceil(math.sqrt(num_images))


def make_grid(images_NHWC: np.ndarray, columns: int, border: int = 2) -> np.ndarray:
    """uint8 images in rows on a white ground, uint8 [height, width, 3]."""
    count, height, width, channels = images_NHWC.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + border) + border, columns * (width + border) + border, 3), 255, np.uint8)
    for index, image in enumerate(images_NHWC):
        top = border + index // columns * (height + border)
        left = border + index % columns * (width + border)
        grid[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return grid


def save_png(grid_HWC: np.ndarray, path: str, scale: int = 1) -> None:
    """Write a grid, enlarged by a whole factor without smoothing so that small images can be seen."""
    picture = Image.fromarray(grid_HWC)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)
