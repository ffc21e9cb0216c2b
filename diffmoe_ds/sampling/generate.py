"""Generate images with a trained model: the same seed gives the same image, on any rank and in any batch.

Legend: N images, B images of a batch, C channels, H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT, DiTOutput
from diffmoe_ds.rng import image_stream
from diffmoe_ds.sampling.dopri5 import Tolerances
from diffmoe_ds.sampling.fields import IntervalField, ModelFn, Progress, in_range
from diffmoe_ds.sampling.guidance import (
    Forward,
    GuideChannels,
    Interval,
    check_guidance,
    check_scale_is_used,
    guide_by_model,
    guided,
    in_interval,
)
from diffmoe_ds.sampling.samplers import ADAPTIVE, check_sampling, noise_levels, sample

PIXEL_CHANNELS = (1, 3)
"""Models with this many channels generate pixels; all others generate latents that a VAE decodes."""


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampler and of guidance."""

    sampler: str
    """A sampler of the model's objective."""
    steps: int
    """Sampler steps; no effect on images generated with dopri5."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 disables guidance."""
    guide_channels: GuideChannels | None = None
    """Guided channels; None is the objective's default: all for flow, the first 3 for DDPM."""
    guidance_interval: Interval | None = None
    """Range of noise levels in which guidance is applied; None applies it at all of them."""
    autoguidance: str | None = None
    """Path of the guiding model, if any; the model itself is passed to `generate`."""
    tolerances: Tolerances = field(default_factory=Tolerances)
    """Error tolerances of dopri5."""

    def check(self, config: Config) -> None:
        """Check that the settings, which are options of ``diffmoe sample``, are valid for a model.

        Raises:
            ConfigError: a setting does not fit the model.
        """
        check_sampling(config.objective.kind, self.sampler, self.steps, prefix="--")
        self.tolerances.check()
        check_scale_is_used(self.cfg_scale, self.guidance_interval, self.autoguidance)
        check_guidance(self.cfg_scale, self.guide_channels, config, is_autoguided=self.autoguidance is not None)
        if self.guidance_interval is not None and self.sampler not in ADAPTIVE:
            check_interval_is_used(self.guidance_interval, self.sampler, self.steps)


def check_interval_is_used(interval: Interval, sampler: str, steps: int) -> None:
    """Check that a sampler with fixed steps evaluates the model in the guidance interval.

    Raises:
        ConfigError: it does not, so guidance would have no effect.
    """
    low, high = interval
    levels = np.unique(noise_levels(sampler, steps))
    if not in_range(levels, low, high).any():
        nearest = [f"{level:.3g}" for level in (*levels[levels < low][-1:], *levels[levels > high][:1])]
        raise ConfigError(
            f"--guidance-interval must contain a noise level of the sampler {sampler} with --steps {steps}, got "
            f"{low:g} {high:g}; the nearest {'is' if len(nearest) == 1 else 'are'} {' and '.join(nearest)}."
        )


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
    model: DiT,
    label_B: Tensor,
    seeds: Sequence[int],
    settings: SamplingSettings,
    progress: Progress | None = None,
    guide: DiT | None = None,
) -> Tensor:
    """Generate one batch of images.

    No step of a sampler with fixed steps waits for the device if experts compute ragged rows as grouped products (in
    bf16 on a GPU): the number of rows is assumed to stay below a bound. The bound is checked after the last step; if it
    was exceeded, all steps are repeated with exact counts, and the next batch assumes twice the bound.

    Args:
        model: in eval mode, in any dtype; the state of the sampler is fp32.
        label_B: int64 labels, or numbers of the prompts of ``model.y_embedder``, on the model's device.
        seeds: one per image; all noise of an image comes from its own stream.
        settings: sampler and guidance.
        progress: called after each step with (steps done, total steps); starts again if all steps are repeated.
        guide: the model of ``settings.autoguidance``, in eval mode on the same device.

    Returns:
        fp32 [B, C, H, W] on the model's device, pixels in about [-1, 1] or latents.
    """
    assert (guide is None) == (settings.autoguidance is None), "the guiding model belongs to its path in the settings"
    models = [model] if guide is None else [model, guide]
    with ExitStack() as stack:
        bounded = [each for each in models if stack.enter_context(each.bounded_dispatch())]
        images_BCHW, must_redo = _generate(models, label_B, seeds, settings, progress)
    if bounded and must_redo:
        for each in bounded:
            each.assumed_capacities *= 2
        images_BCHW, _ = _generate(models, label_B, seeds, settings, progress)
    if model.observer is not None:
        model.observer.keep()
    return images_BCHW


def _generate(
    models: Sequence[DiT], label_B: Tensor, seeds: Sequence[int], settings: SamplingSettings, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Return the images of `generate`, and whether rows were lost in any step, as a bool scalar."""
    config = models[0].config
    device = label_B.device
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    streams = [image_stream(seed) for seed in seeds]
    must_redo = torch.zeros((), dtype=torch.bool, device=device)
    if models[0].observer is not None:
        models[0].observer.start()

    def noise() -> Tensor:
        fresh = torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))
        # from pageable memory the copy would wait for all steps before it
        return (fresh.pin_memory() if device.type == "cuda" else fresh).to(device, non_blocking=True)

    model_fn = _guided_model(models, label_B, settings, must_redo)
    images_BCHW = sample(
        model_fn, settings.sampler, noise(), settings.steps, noise, progress, tolerances=settings.tolerances
    )
    return images_BCHW, must_redo


def _guided_model(
    models: Sequence[DiT], label_B: Tensor, settings: SamplingSettings, must_redo: Tensor
) -> ModelFn | IntervalField:
    """Return the function that the sampler calls; it sets ``must_redo`` if rows were lost.

    Args:
        models: the model, and the guiding one if there is one.
        label_B: int64 labels.
        settings: guidance.
        must_redo: a bool scalar.
    """

    def forward_of(model: DiT) -> Forward:
        def forward(x_BCHW: Tensor, t_B: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
            y_B, inputs = condition
            output: DiTOutput = model(x_BCHW, t_B, inputs)
            if model.observer is not None:
                model.observer.observe(t_B, y_B, output)
            for routing in output.routing:
                if routing.must_redo is not None:
                    must_redo.logical_or_(routing.must_redo)
            return output.prediction

        return forward

    def labelled(label_B: Tensor) -> tuple[Tensor, Tensor]:
        return label_B, model.y_embedder.inputs(label_B)

    model, *guides = models
    condition = labelled(label_B)
    forward, kind, channels = forward_of(model), model.config.objective.kind, model.config.model.in_channels
    if guides:
        pair = (forward, forward_of(guides[0]))
        guided_fn = guide_by_model(pair, condition, settings.cfg_scale, kind, channels, settings.guide_channels)
    else:
        guided_fn = guided(
            forward,
            condition,
            labelled(model.y_embedder.null_like(label_B)) if settings.cfg_scale != 1 else condition,
            settings.cfg_scale,
            kind,
            channels,
            settings.guide_channels,
            one_batch=not model.images_compete,
        )
    return in_interval(guided_fn, lambda x, t_B: forward(x, t_B, condition), settings.guidance_interval)
