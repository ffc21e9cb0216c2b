"""The model as a sampler calls it: a function of noisy images and times, which may depend on the noise level.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffmoe_ds.diffusion.flow import per_image

ModelFn = Callable[[Tensor, Tensor], Tensor]
"""(x_BCHW, t_B) -> prediction."""
NoiseLevel = float | npt.NDArray[np.float64]
"""0 (clean) to 1 (noise), on the host: one for all images, or float64 [B] with one per image."""
Field = Callable[[Tensor, Tensor, NoiseLevel], Tensor]
"""(x_BCHW, t_B, noise level) -> prediction. The level follows from the times, but reading them would synchronize."""
NoiseFn = Callable[[], Tensor]
"""() -> standard normal noise with the shape of the images, different at each call."""
ROUNDING = 1e-9
"""Tolerance in comparisons of noise levels: ``1 - 8 / 10`` is less than 0.2 in floating point."""
Progress = Callable[[int, int], object]
"""(steps done, total steps) -> anything."""


@dataclass(frozen=True)
class Run:
    """Inputs of a sampler other than the initial noise."""

    field: Field
    steps: int
    noise_fn: NoiseFn | None
    """For stochastic samplers only."""
    progress: Progress

    def noise_like(self, x_BCHW: Tensor) -> Tensor:
        """Return new standard normal noise in the dtype of the images."""
        assert self.noise_fn is not None, "checked by `samplers.sample`"
        return self.noise_fn().to(x_BCHW.dtype)


def in_range(level: NoiseLevel, low: float, high: float) -> npt.NDArray[np.bool_]:
    """Return which noise levels are in an interval that includes its ends."""
    levels = np.asarray(level)
    return np.asarray((low - ROUNDING <= levels) & (levels <= high + ROUNDING))


@dataclass(frozen=True)
class IntervalField:
    """A `Field` that calls one model function at noise levels inside an interval and another outside it."""

    inside: ModelFn
    outside: ModelFn
    low: float
    """Lower end of the interval, included."""
    high: float
    """Upper end of the interval, included."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, level: NoiseLevel) -> Tensor:
        """Return the prediction; both functions are called only if some images are inside and some outside."""
        is_inside = in_range(level, self.low, self.high)
        if is_inside.all():
            return self.inside(x_BCHW, t_B)
        if not is_inside.any():
            return self.outside(x_BCHW, t_B)
        mask_B = torch.from_numpy(is_inside).to(x_BCHW.device)
        return torch.where(per_image(mask_B, x_BCHW), self.inside(x_BCHW, t_B), self.outside(x_BCHW, t_B))


def as_field(model_fn: ModelFn | IntervalField) -> Field:
    """Return a model function as a field."""
    return model_fn if isinstance(model_fn, IntervalField) else lambda x_BCHW, t_B, level: model_fn(x_BCHW, t_B)
