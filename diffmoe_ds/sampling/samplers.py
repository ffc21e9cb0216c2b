"""Samplers turn noise into images: Euler and Heun for rectified flow, ancestral and DDIM steps for DDPM.

A sampler sees a ``model_fn(x_BCHW, t_B) -> prediction`` that already includes guidance (`sampling/guidance.py` makes
one) and draws no random numbers: initial and per-step noise come from the caller, one stream per image, so that an
image does not depend on its batch or on the number of ranks.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_ds.diffusion.ddpm import TRAIN_STEPS, check_steps, dit_diffusion
from diffmoe_ds.diffusion.flow import at_least_float32
from diffmoe_ds.diffusion.objective import SAMPLERS, make_objective
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.fields import Field, IntervalField, ModelFn, NoiseFn, Progress, as_field


def check_sampling(objective: str, sampler: str, steps: int, prefix: str = "") -> None:
    """Check that a sampler and a number of steps are valid for an objective.

    Args:
        objective: ``flow`` or ``ddpm``.
        sampler: one of `SAMPLERS`.
        steps: sampler steps.
        prefix: of the names in messages, ``--`` for options and ``sample.`` for a recipe's keys.

    Raises:
        ConfigError: the sampler is unknown or belongs to the other objective, or the number of steps is invalid.
    """
    valid = make_objective(objective).samplers
    if sampler not in valid:
        raise ConfigError(f"{prefix}sampler must be {' or '.join(valid)} for a {objective} model, got {sampler!r}.")
    _check_steps(sampler, steps, f"{prefix}steps")


def _check_steps(sampler: str, steps: int, name: str = "steps") -> None:
    if SAMPLERS[sampler] == "ddpm":
        check_steps(TRAIN_STEPS, steps, name)
    elif not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"{name} must be a positive integer for the sampler {sampler}, got {steps!r}.")


@torch.inference_mode()
def sample(
    model_fn: ModelFn | IntervalField,
    sampler: str,
    noise_BCHW: Tensor,
    steps: int,
    noise_fn: NoiseFn | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Turn noise into images.

    Args:
        model_fn: called with times as in training: float32 in [0, 1) for flow (Heun also evaluates at 1), the int64
            timestep for DDPM.
        sampler: one of `SAMPLERS`.
        noise_BCHW: standard normal initial noise.
        steps: sampler steps, at most 1000 for DDPM models.
        noise_fn: called between steps, ``steps - 1`` times, by ``ddpm`` only.
        progress: called after every step.

    Returns:
        [B, C, H, W], float32 or wider.

    Raises:
        ConfigError: unknown sampler, wrong number of steps, or ``ddpm`` without ``noise_fn``.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler must be {' or '.join(SAMPLERS)}, got {sampler!r}.")
    _check_steps(sampler, steps)
    x = at_least_float32(noise_BCHW)
    progress = progress or (lambda done, total: None)
    field = as_field(model_fn)
    if SAMPLERS[sampler] == "flow":
        return _sample_flow(field, x, steps, sampler == "heun", progress)
    if sampler == "ddim":
        return _sample_ddpm(field, x, steps, None, progress)
    if noise_fn is None:
        raise ConfigError("the sampler ddpm needs noise_fn, because every step but the last adds noise.")
    return _sample_ddpm(field, x, steps, noise_fn, progress)


def _sample_flow(field: Field, x: Tensor, steps: int, heun: bool, progress: Progress) -> Tensor:
    """Integrate with explicit Euler, or with Heun's method: two evaluations in every step, the last one included."""
    # one copy to the device; the steps take views of it
    times = torch.tensor([i / steps for i in range(steps + 1)], dtype=torch.float32, device=x.device)

    def velocity(x: Tensor, i: int) -> Tensor:
        return field(x, times[i].expand(len(x)), 1 - i / steps).to(x.dtype)

    for i in range(steps):
        v = velocity(x, i)
        if heun:
            v = (v + velocity(x + v / steps, i + 1)) / 2
        x = x + v / steps
        progress(i + 1, steps)
    return x


def _sample_ddpm(field: Field, x: Tensor, steps: int, noise_fn: NoiseFn | None, progress: Progress) -> Tensor:
    """Take ancestral steps with noise from ``noise_fn``, or DDIM steps if it is None."""
    process = dit_diffusion().respaced(steps)
    steps_N = torch.arange(process.num_steps, device=x.device)
    for i in reversed(range(process.num_steps)):
        t_B = steps_N[i].expand(len(x))
        prediction = field(x, process.model_timesteps(t_B), process.timesteps_N[i] / TRAIN_STEPS)
        if noise_fn is None:
            x = process.ddim_step(prediction, x, t_B)
        else:
            noise = noise_fn().to(x.dtype) if i > 0 else None  # the last step adds none
            x = process.ancestral_step(prediction, x, t_B, noise)
        progress(process.num_steps - i, process.num_steps)
    return x
