"""Objectives: one interface for training and sampling with rectified flow and DDPM.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

from torch import Tensor

from diffmoe_ds.diffusion.ddpm import TRAIN_STEPS, GaussianDiffusion, dit_diffusion
from diffmoe_ds.diffusion.flow import flow_interpolate, flow_loss
from diffmoe_ds.errors import ConfigError

SAMPLERS: dict[str, str] = {
    "euler": "flow",
    "heun": "flow",
    "dopri5": "flow",
    "sde": "flow",
    "ddpm": "ddpm",
    "ddim": "ddpm",
    "dpm": "ddpm",
}
"""Sampler -> the objective whose models it samples; the first sampler of an objective is its default."""


NOISE_BINS = 10
"""Number of bins of the noise level, from 0 (clean) to 1 (pure noise)."""


class Objective(Protocol):
    """How images are noised, what the model predicts and how the prediction is scored."""

    @property
    def kind(self) -> str:
        """``flow`` or ``ddpm``."""
        ...

    @property
    def samplers(self) -> tuple[str, ...]:
        """Samplers for models of this objective, the default first."""
        ...

    def out_channels(self, in_channels: int) -> int:
        """Return the number of channels that the model predicts for images or latents of ``in_channels``."""
        ...

    def model_time(self, time_B: Tensor) -> Tensor:
        """Convert times to the ``t_B`` of the model and of the methods below.

        Args:
            time_B: times drawn uniformly from [0, 1).
        """
        ...

    def corrupt(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the noisy images that the model sees, float32 or wider."""
        ...

    def target(self, x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Return what the model learns to predict, without the variance of DDPM."""
        ...

    def loss(self, prediction: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        """Return losses per image, [B], float32 or wider.

        Returns:
            ``loss_B``, which training minimizes, and its parts under other names.
        """
        ...

    def noise_level(self, t_B: Tensor) -> Tensor:
        """Return float32 in [0, 1], where 1 is pure noise, for plots of both objectives on one axis."""
        ...


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow (`diffusion/flow.py`). ``t`` is the time itself, float32: 0 is noise, 1 is data."""

    kind: str = "flow"

    @property
    def samplers(self) -> tuple[str, ...]:
        """See `Objective`."""
        return _samplers_of(self.kind)

    def out_channels(self, in_channels: int) -> int:
        """Return one velocity per channel."""
        return in_channels

    def model_time(self, time_B: Tensor) -> Tensor:
        """See `Objective`."""
        return time_B.float()

    def corrupt(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """See `Objective`."""
        return flow_interpolate(x_BCHW, noise_BCHW, t_B)

    def target(self, x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """See `Objective`."""
        return x_BCHW - noise_BCHW

    def loss(self, prediction: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        """See `Objective`."""
        return {"loss_B": flow_loss(prediction, x_BCHW, noise_BCHW)}

    def noise_level(self, t_B: Tensor) -> Tensor:
        """See `Objective`."""
        return 1 - t_B.float()


@dataclass(frozen=True)
class DDPMObjective:
    """DDPM with a learned variance (`diffusion/ddpm.py`). ``t`` is an int64 timestep: 0 is nearly data, 999 noise."""

    kind: str = "ddpm"
    min_snr_gamma: float | None = None
    """Weight the squared error by min(SNR, gamma) / SNR; None for training without weights, and for validation."""

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        """The process of 1000 steps."""
        return dit_diffusion()

    @property
    def samplers(self) -> tuple[str, ...]:
        """See `Objective`."""
        return _samplers_of(self.kind)

    def out_channels(self, in_channels: int) -> int:
        """Return noise and variance for each channel."""
        return 2 * in_channels

    def model_time(self, time_B: Tensor) -> Tensor:
        """See `Objective`."""
        # times just below 1 would round up to 1000
        return (time_B * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)

    def corrupt(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """See `Objective`."""
        return self.diffusion.q_sample(x_BCHW, t_B, noise_BCHW)

    def target(self, x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """See `Objective`."""
        return noise_BCHW

    def loss(self, prediction: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        """See `Objective`."""
        losses = self.diffusion.training_losses(prediction, x_BCHW, noise_BCHW, t_B)
        loss_B = losses.loss_B
        if self.min_snr_gamma is not None:
            loss_B = self.diffusion.min_snr_weight(t_B, self.min_snr_gamma) * losses.mse_B + losses.vb_B
        return {"loss_B": loss_B, "mse_B": losses.mse_B, "vb_B": losses.vb_B}

    def noise_level(self, t_B: Tensor) -> Tensor:
        """See `Objective`."""
        return t_B.float() / TRAIN_STEPS


def make_objective(kind: str, min_snr_gamma: float | None = None) -> Objective:
    """Return the objective with a name.

    Args:
        kind: ``flow`` or ``ddpm``.
        min_snr_gamma: of the training loss of ``ddpm``.

    Raises:
        ConfigError: the name is unknown.
    """
    objectives: dict[str, Callable[[], Objective]] = {
        "flow": FlowObjective,
        "ddpm": partial(DDPMObjective, min_snr_gamma=min_snr_gamma),
    }
    if kind not in objectives:
        raise ConfigError(f"objective.kind must be {' or '.join(objectives)}, got {kind!r}.")
    return objectives[kind]()


def noise_bin(noise_level_B: Tensor) -> Tensor:
    """Return the bin of each noise level in [0, 1], int64 from 0 (clean) to `NOISE_BINS` - 1 (pure noise)."""
    return (noise_level_B * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)


def _samplers_of(objective: str) -> tuple[str, ...]:
    return tuple(sampler for sampler, kind in SAMPLERS.items() if kind == objective)
