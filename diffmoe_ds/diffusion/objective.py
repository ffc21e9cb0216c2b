"""What training and sampling need to know about an objective, so that neither asks which one it is.

Shapes: B images, C channels, H, W.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from diffmoe_ds.diffusion.ddpm import TRAIN_STEPS, GaussianDiffusion, dit_diffusion
from diffmoe_ds.diffusion.flow import flow_interpolate, flow_loss
from diffmoe_ds.errors import ConfigError

#: Sampler -> the objective whose models it samples; the first of an objective is its default.
SAMPLERS: dict[str, str] = {"euler": "flow", "heun": "flow", "ddpm": "ddpm", "ddim": "ddpm"}


class Objective(Protocol):
    """How images are corrupted, what the model predicts and how it is scored."""

    kind: str

    @property
    def samplers(self) -> tuple[str, ...]:
        """Samplers for this objective, the default first."""

    def out_channels(self, in_channels: int) -> int:
        """Channels that the model predicts for ``in_channels`` latent channels."""

    def model_time(self, time_B: Tensor) -> Tensor:
        """The ``t`` given to the model and to the methods below, for times uniform in [0, 1)."""

    def corrupt(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noisy images that the model sees, float32 or wider."""

    def loss(self, prediction: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        """Per-image losses [B], float32 or wider: "loss_B" to train on, and its parts under names of their own."""

    def noise_level(self, t_B: Tensor) -> Tensor:
        """Float32 in [0, 1], 1 is pure noise: one axis for plots of both objectives."""


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow, see `flow`.  ``t`` is the time itself, float32: 0 is noise, 1 is data."""

    kind: str = "flow"

    @property
    def samplers(self) -> tuple[str, ...]:
        return _samplers_of(self.kind)

    def out_channels(self, in_channels: int) -> int:
        return in_channels

    def model_time(self, time_B: Tensor) -> Tensor:
        return time_B.float()

    def corrupt(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return flow_interpolate(x_BCHW, noise_BCHW, t_B)

    def loss(self, prediction: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        return {"loss_B": flow_loss(prediction, x_BCHW, noise_BCHW)}

    def noise_level(self, t_B: Tensor) -> Tensor:
        return 1 - t_B.float()


@dataclass(frozen=True)
class DDPMObjective:
    """DDPM with a learned variance, see `ddpm`.  ``t`` is an int64 timestep: 0 is nearly data, 999 is noise."""

    kind: str = "ddpm"

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        return dit_diffusion()

    @property
    def samplers(self) -> tuple[str, ...]:
        return _samplers_of(self.kind)

    def out_channels(self, in_channels: int) -> int:
        return 2 * in_channels

    def model_time(self, time_B: Tensor) -> Tensor:
        # The clamp is for times so close to 1 that the product rounds up to 1000.
        return (time_B * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)

    def corrupt(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return self.diffusion.q_sample(x_BCHW, t_B, noise_BCHW)

    def loss(self, prediction: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        losses = self.diffusion.training_losses(prediction, x_BCHW, noise_BCHW, t_B)
        return {"loss_B": losses.loss_B, "mse_B": losses.mse_B, "vb_B": losses.vb_B}

    def noise_level(self, t_B: Tensor) -> Tensor:
        return t_B.float() / TRAIN_STEPS


def make_objective(kind: str) -> Objective:
    """The objective called ``kind``, "flow" or "ddpm"; raises ConfigError for anything else."""
    objectives = {"flow": FlowObjective, "ddpm": DDPMObjective}
    if kind not in objectives:
        raise ConfigError(f"objective.kind is {kind!r}; valid is {' or '.join(objectives)}.")
    return objectives[kind]()


def _samplers_of(objective: str) -> tuple[str, ...]:
    return tuple(sampler for sampler, kind in SAMPLERS.items() if kind == objective)
