"""Generate images with a trained model: the same seed gives the same image, on any rank and in any batch.

Legend: N images, B images of a batch, C channels, H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.model.dit import DiT, DiTOutput
from diffmoe_ds.rng import image_stream
from diffmoe_ds.sampling.guidance import GuideChannels, check_guidance, guided
from diffmoe_ds.sampling.samplers import Progress, check_sampling, sample

PIXEL_CHANNELS = (1, 3)
"""Models with this many channels generate pixels; all others generate latents that a VAE decodes."""


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampler and of guidance."""

    sampler: str
    """A sampler of the model's objective."""
    steps: int
    """Sampler steps."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 disables guidance."""
    guide_channels: GuideChannels = "all"
    """Guided channels of a DDPM model; the reference guides the first 3."""

    def check(self, config: Config) -> None:
        """Check that the settings, which are options of ``diffmoe sample``, are valid for a model.

        Raises:
            ConfigError: a setting does not fit the model.
        """
        check_sampling(config.objective.kind, self.sampler, self.steps, prefix="--")
        check_guidance(self.cfg_scale, self.guide_channels, config)


def share_of_rank(num_images: int, seed: int, rank: int, world: int) -> range:
    """Return the seeds of the images that a rank generates.

    Args:
        num_images: N, over all ranks.
        seed: the seed of the first image; image i has seed ``seed + i``.
        rank: this rank.
        world: number of ranks.

    Returns:
        A contiguous share, equally long on all ranks; shares past the last image are padded with further seeds.
    """
    share = math.ceil(num_images / world)
    return range(seed + rank * share, seed + (rank + 1) * share)


@torch.inference_mode()
def generate(
    model: DiT, label_B: Tensor, seeds: Sequence[int], settings: SamplingSettings, progress: Progress | None = None
) -> Tensor:
    """Generate one batch of images.

    No step waits for the device if experts compute ragged rows as grouped products (in bf16 on a GPU): the number of
    rows is assumed to stay below a bound. The bound is checked after the last step; if it was exceeded, all steps are
    repeated with exact counts, and the next batch assumes twice the bound.

    Args:
        model: in eval mode, in any dtype; the state of the sampler is fp32.
        label_B: int64 labels, on the model's device.
        seeds: one per image; all noise of an image comes from its own stream.
        settings: sampler and guidance.
        progress: called after each step with (steps done, total steps); starts again if all steps are repeated.

    Returns:
        fp32 [B, C, H, W] on the model's device, pixels in about [-1, 1] or latents.
    """
    with model.bounded_dispatch() as is_bounded:
        images_BCHW, must_redo = _generate(model, label_B, seeds, settings, progress)
    if is_bounded and must_redo:
        model.assumed_capacities *= 2
        images_BCHW, _ = _generate(model, label_B, seeds, settings, progress)
    return images_BCHW


def _generate(
    model: DiT, label_B: Tensor, seeds: Sequence[int], settings: SamplingSettings, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Return the images of `generate`, and whether rows were lost in any step, as a bool scalar."""
    config = model.config
    device = label_B.device
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    streams = [image_stream(seed) for seed in seeds]
    must_redo = torch.zeros((), dtype=torch.bool, device=device)

    def noise() -> Tensor:
        fresh = torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))
        # from pageable memory the copy would wait for all steps before it
        return (fresh.pin_memory() if device.type == "cuda" else fresh).to(device, non_blocking=True)

    def forward(x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        output: DiTOutput = model(x_BCHW, t_B, y_B)
        for routing in output.routing:
            if routing.must_redo is not None:
                must_redo.logical_or_(routing.must_redo)
        return output.prediction

    model_fn = guided(
        forward,
        label_B,
        model.y_embedder.null_like(label_B),
        settings.cfg_scale,
        make_objective(config.objective.kind).kind,
        config.model.in_channels,
        settings.guide_channels,
        one_batch=not model.images_compete,
    )
    return sample(model_fn, settings.sampler, noise(), settings.steps, noise, progress), must_redo
