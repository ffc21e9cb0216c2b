"""From noise to images: Euler and Heun for rectified flow, ancestral and DDIM steps for DDPM, and guidance for both.

A sampler sees a ``model_fn(x_BCHW, t_B) -> prediction`` that is already guided (`guided` makes one), and draws no
random numbers: start and per-step noise come from the caller, one stream per image, so that an image does not depend
on its batch mates or on the number of ranks.  Shapes: B images, C channels, H, W.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ds.diffusion.ddpm import TRAIN_STEPS, dit_diffusion, spaced_steps
from diffmoe_ds.diffusion.flow import at_least_float32
from diffmoe_ds.diffusion.objective import SAMPLERS
from diffmoe_ds.errors import ConfigError

ModelFn = Callable[[Tensor, Tensor], Tensor]
NoiseFn = Callable[[], Tensor]
Progress = Callable[[int, int], None]


def check_sampling(objective: str, sampler: str, steps: int | str) -> None:
    """Raise ConfigError when ``sampler`` is unknown or not for this objective, or does not take so many steps."""
    valid = [name for name, kind in SAMPLERS.items() if kind == objective]
    assert valid, f"unknown objective {objective!r}"
    if sampler not in valid:
        raise ConfigError(f"sampler is {sampler!r}; valid for a {objective} model is {' or '.join(valid)}.")
    _check_steps(sampler, steps)


def _check_steps(sampler: str, steps: int | str) -> None:
    if SAMPLERS[sampler] == "ddpm":
        spaced_steps(TRAIN_STEPS, steps)
    elif not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"steps is {steps!r}; valid for the sampler {sampler} is a whole number from 1.")


@torch.no_grad()
def sample(
    model_fn: ModelFn,
    kind: str,
    z_B: Tensor,
    steps: int | str,
    noise_fn: NoiseFn | None = None,
    progress: Progress | None = None,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Tensor:
    """Integrate the noise ``z_B`` [B, C, H, W] to images of the same shape, float32 or wider.

    ``kind`` is one of SAMPLERS.  ``steps`` is a whole number, for DDPM models at most 1000 or a 'ddimN' spacing.
    ``noise_fn()`` returns fresh noise like ``z_B`` and is called between steps, so ``steps - 1`` times, by "ddpm" and
    by "ddim" with ``eta`` in (0, 1]; the others never call it.  ``clip_denoised`` is for DDPM models of pixels.
    ``progress(done, total)`` is called after every step.  The model gets ``t_B`` as in training: float32 in [0, 1)
    for flow (Heun also asks at 1), the original int64 timestep for DDPM.

    Raises ConfigError for an unknown kind, a wrong number of steps, a wrong ``eta`` or a missing ``noise_fn``.
    """
    if kind not in SAMPLERS:
        raise ConfigError(f"sampler is {kind!r}; valid is {' or '.join(SAMPLERS)}.")
    _check_steps(kind, steps)
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta is {eta!r}; valid is a number from 0 (deterministic) to 1.")
    if noise_fn is None and (kind == "ddpm" or (kind == "ddim" and eta > 0)):
        raise ConfigError(f"noise_fn is None; the sampler {kind} with eta {eta} needs fresh noise for every step.")
    x = at_least_float32(z_B)
    progress = progress or (lambda done, total: None)
    if SAMPLERS[kind] == "flow":
        return _sample_flow(model_fn, x, steps, kind == "heun", progress)
    return _sample_ddpm(model_fn, x, steps, kind, noise_fn, progress, eta, clip_denoised)


def _sample_flow(model_fn: ModelFn, x: Tensor, steps: int, heun: bool, progress: Progress) -> Tensor:
    """Explicit Euler, or Heun's method with two evaluations in every step, the last one included."""

    def velocity(x: Tensor, i: int) -> Tensor:
        t_B = torch.full((len(x),), i / steps, dtype=torch.float32, device=x.device)
        return model_fn(x, t_B).to(x.dtype)

    for i in range(steps):
        v = velocity(x, i)
        if heun:
            v = (v + velocity(x + v / steps, i + 1)) / 2
        x = x + v / steps
        progress(i + 1, steps)
    return x


def _sample_ddpm(
    model_fn: ModelFn,
    x: Tensor,
    steps: int | str,
    kind: str,
    noise_fn: NoiseFn | None,
    progress: Progress,
    eta: float,
    clip_denoised: bool,
) -> Tensor:
    process = dit_diffusion().respaced(steps)
    for i in reversed(range(process.num_steps)):
        t_B = torch.full((len(x),), i, dtype=torch.int64, device=x.device)
        prediction = model_fn(x, process.model_timesteps(t_B))
        draws = i > 0 and (kind == "ddpm" or eta > 0)  # the last step adds no noise, with any eta
        noise = noise_fn().to(x.dtype) if draws else None
        if kind == "ddpm":
            x = process.ancestral_step(prediction, x, t_B, noise, clip_denoised)
        else:
            x = process.ddim_step(prediction, x, t_B, noise, eta if draws else 0.0, clip_denoised)
        progress(process.num_steps - i, process.num_steps)
    return x


def guided(
    forward: Callable[[Tensor, Tensor, Any], Tensor],
    cond: Any,
    null_cond: Any,
    scale: float,
    kind: str,
    channels: int,
    guide_channels: int | Literal["all"] = 3,
) -> ModelFn:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): a model_fn from ``forward(x_BCHW, t_B, cond)``.

    ``cond`` and ``null_cond`` are tensors [B, ...], or tuples or mappings of them; ``kind`` is the objective,
    "flow" or "ddpm"; ``channels`` is C of the latent.

    - ``scale`` 1: one forward with ``cond``, nothing else; ``null_cond`` may be None.
    - flow: two forwards, ``v_null + scale * (v_cond - v_null)``, so with routing over a batch pool the conditional
      and the unconditional tokens compete among themselves only.
    - ddpm: one forward over [cond; null], where they compete with each other.  Only the first ``guide_channels``
      noise channels are guided: 3 is DiT's published setting, "all" guides all C.  The rest, the variance among it,
      is the conditional half's.
    """
    if scale == 1:
        return lambda x, t_B: forward(x, t_B, cond)
    if kind == "flow":

        def flow_fn(x: Tensor, t_B: Tensor) -> Tensor:
            v_cond, v_null = forward(x, t_B, cond), forward(x, t_B, null_cond)
            return v_null + scale * (v_cond - v_null)

        return flow_fn

    assert kind == "ddpm", f"unknown objective {kind!r}"
    G = channels if guide_channels == "all" else min(guide_channels, channels)
    both = _concatenate(cond, null_cond)

    def ddpm_fn(x: Tensor, t_B: Tensor) -> Tensor:
        from_cond, from_null = forward(torch.cat([x, x]), torch.cat([t_B, t_B]), both).chunk(2)
        noise = from_null[:, :G] + scale * (from_cond[:, :G] - from_null[:, :G])
        return torch.cat([noise, from_cond[:, G:]], dim=1)

    return ddpm_fn


def _concatenate(cond: Any, null_cond: Any) -> Any:
    """Join two conditionings of equal structure along the batch."""
    if isinstance(cond, Tensor):
        return torch.cat([cond, null_cond])
    if isinstance(cond, Mapping):
        return {name: _concatenate(cond[name], null_cond[name]) for name in cond}
    return tuple(_concatenate(*pair) for pair in zip(cond, null_cond, strict=True))
