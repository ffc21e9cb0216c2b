"""Samplers: ODE and SDE solvers for rectified flow; ancestral, DDIM and DPM-Solver++ for DDPM.

A sampler calls a ``model_fn(x_BCHW, t_B) -> prediction`` that already includes guidance (`sampling/guidance.py` makes
one) and draws no random numbers: initial and per-step noise come from the caller, one stream per image, so that an
image does not depend on its batch or on the number of ranks.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmoe_ds.diffusion.ddpm import TRAIN_STEPS, GaussianDiffusion, check_steps, dit_diffusion
from diffmoe_ds.diffusion.flow import at_least_float32
from diffmoe_ds.diffusion.objective import SAMPLERS, make_objective
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.dopri5 import Tolerances, integrate
from diffmoe_ds.sampling.dpm import dpm, scheduler_class
from diffmoe_ds.sampling.fields import Field, IntervalField, ModelFn, NoiseFn, NoiseLevel, Progress, Run, as_field

ADAPTIVE = ("dopri5",)
"""Samplers whose number of forward passes is not fixed in advance."""
STOCHASTIC = ("sde", "ddpm")
"""Samplers that add noise in every step except the last."""
SDE_LAST_STEP = 0.04
"""Length of the last, deterministic step of ``sde``: SiT's default."""


def check_sampling(objective: str, sampler: str, steps: int, prefix: str = "") -> None:
    """Check that a sampler and a number of steps are valid for an objective, and that its library is installed.

    Args:
        objective: ``flow`` or ``ddpm``.
        sampler: one of `SAMPLERS`.
        steps: sampler steps.
        prefix: prefix of the names in messages: ``--`` for options, ``sample.`` for a recipe's keys.

    Raises:
        ConfigError: the sampler is unknown or belongs to the other objective, the number of steps is invalid, or
            diffusers is not installed.
    """
    valid = make_objective(objective).samplers
    if sampler not in valid:
        raise ConfigError(f"{prefix}sampler must be {_either(valid)} for a {objective} model, got {sampler!r}.")
    _check_steps(sampler, steps, f"{prefix}steps")
    if sampler == "dpm":
        scheduler_class()


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
    tolerances: Tolerances | None = None,
) -> Tensor:
    """Turn noise into images.

    Args:
        model_fn: called with times as in training: float32 in [0, 1) for flow (Heun also evaluates at 1, dopri5 beyond
            it), the int64 timestep for DDPM.
        sampler: one of `SAMPLERS`.
        noise_BCHW: standard normal initial noise.
        steps: sampler steps, at most 1000 for DDPM models; for dopri5, only the resolution of ``progress``.
        noise_fn: called between steps, ``steps - 1`` times, by ``sde`` and ``ddpm`` only.
        progress: called after every step.
        tolerances: tolerances of dopri5; None uses the defaults.

    Returns:
        [B, C, H, W], float32 or wider.

    Raises:
        ConfigError: unknown sampler, wrong number of steps, or ``sde`` or ``ddpm`` without ``noise_fn``.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler must be {_either(SAMPLERS)}, got {sampler!r}.")
    _check_steps(sampler, steps)
    if sampler in STOCHASTIC and noise_fn is None:
        raise ConfigError(f"the sampler {sampler} needs noise_fn, because every step except the last adds noise.")
    run = Run(as_field(model_fn), steps, noise_fn, progress or (lambda done, total: None))
    x = at_least_float32(noise_BCHW)
    if sampler in ADAPTIVE:
        return integrate(run, x, tolerances or Tolerances())
    return FIXED_STEPS[sampler](run, x)


def noise_levels(sampler: str, steps: int) -> list[float]:
    """Return the noise levels at which a sampler with fixed steps evaluates the model, by running it on one pixel.

    Args:
        sampler: one of `FIXED_STEPS`.
        steps: sampler steps.
    """
    levels: list[float] = []
    channels = make_objective(SAMPLERS[sampler]).out_channels(1)

    def record(x_BCHW: Tensor, t_B: Tensor, level: NoiseLevel) -> Tensor:
        levels.append(float(level))
        return x_BCHW.new_zeros(1, channels, 1, 1)

    pixel = torch.zeros(1, 1, 1, 1)
    FIXED_STEPS[sampler](Run(record, steps, lambda: pixel, lambda done, total: None), pixel)
    return levels


def euler(run: Run, x: Tensor) -> Tensor:
    """Integrate the velocity with explicit Euler."""
    velocity = _velocity_at(run.field, [i / run.steps for i in range(run.steps)], x)
    for i in range(run.steps):
        x = x + velocity(x, i) / run.steps
        run.progress(i + 1, run.steps)
    return x


def heun(run: Run, x: Tensor) -> Tensor:
    """Integrate the velocity with Heun's method: two evaluations per step, including the last."""
    velocity = _velocity_at(run.field, [i / run.steps for i in range(run.steps + 1)], x)
    for i in range(run.steps):
        v = velocity(x, i)
        v = (v + velocity(x + v / run.steps, i + 1)) / 2
        x = x + v / run.steps
        run.progress(i + 1, run.steps)
    return x


def sde(run: Run, x: Tensor) -> Tensor:
    """Integrate SiT's reverse SDE with Euler-Maruyama (Ma et al., arXiv 2401.08740, section 2.4).

    ``dx = (v + w score) dt + sqrt(2 w) dW`` has the same marginals as the ODE ``dx = v dt`` for any w(t) >= 0. The
    linear path's score follows from the velocity: ``(t v - x) / (1 - t)``. With ``w = 1 - t``, SiT's default (there
    "sigma"), nothing is singular: ``dx = ((1 + t) v - x) dt + sqrt(2 (1 - t)) dW``. As in SiT, all steps except
    the last have equal length, and the last one, from 0.96 to 1, adds no noise.
    """
    last = SDE_LAST_STEP if run.steps > 1 else 1.0
    times = [i * (1 - last) / max(run.steps - 1, 1) for i in range(run.steps)]
    velocity = _velocity_at(run.field, times, x)
    for i, (t, following) in enumerate(zip(times, [*times[1:], 1.0], strict=True)):
        drift = (1 + t) * velocity(x, i) - x
        x = x + drift * (following - t)
        if i + 1 < run.steps:
            x = x + math.sqrt(2 * (1 - t) * (following - t)) * run.noise_like(x)
        run.progress(i + 1, run.steps)
    return x


def ddpm(run: Run, x: Tensor) -> Tensor:
    """Sample from the model's Gaussian in every step (DDPM, algorithm 2); the last step takes its mean."""

    def step(process: GaussianDiffusion, prediction: Tensor, x: Tensor, t_B: Tensor, is_last: bool) -> Tensor:
        return process.ancestral_step(prediction, x, t_B, None if is_last else run.noise_like(x))

    return _reverse(run, x, step)


def ddim(run: Run, x: Tensor) -> Tensor:
    """Take deterministic DDIM steps."""
    return _reverse(run, x, lambda process, prediction, x, t_B, is_last: process.ddim_step(prediction, x, t_B))


FIXED_STEPS: dict[str, Callable[[Run, Tensor], Tensor]] = {
    "euler": euler,
    "heun": heun,
    "sde": sde,
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm": dpm,
}


def _reverse(run: Run, x: Tensor, step: Callable[[GaussianDiffusion, Tensor, Tensor, Tensor, bool], Tensor]) -> Tensor:
    """Run a shortened DDPM process; ``step(process, prediction, x, t_B, is_last)`` returns the next images."""
    process = dit_diffusion().respaced(run.steps)
    steps_N = torch.arange(run.steps, device=x.device)
    for i in reversed(range(run.steps)):
        t_B = steps_N[i].expand(len(x))
        prediction = run.field(x, process.model_timesteps(t_B), float(process.timesteps_N[i]) / TRAIN_STEPS)
        x = step(process, prediction, x, t_B, i == 0)
        run.progress(run.steps - i, run.steps)
    return x


def _velocity_at(field: Field, times: Sequence[float], x: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return the velocity as a function of images and a time index."""
    # one copy to the device; the steps take views of it
    on_device = torch.tensor(times, dtype=torch.float32, device=x.device)
    return lambda x, i: field(x, on_device[i].expand(len(x)), 1 - times[i]).to(x.dtype)


def _either(names: Sequence[str] | dict[str, str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
