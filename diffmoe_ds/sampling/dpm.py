"""DPM-Solver++ for DDPM models (Lu et al., arXiv 2211.01095), through diffusers' `DPMSolverMultistepScheduler`.

Legend: B images, C channels, H, W height and width, N steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.diffusion.ddpm import BETAS, TRAIN_STEPS, Table, dit_diffusion
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.fields import Run


def scheduler_class() -> Any:
    """Return diffusers' scheduler class.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError:
        raise ConfigError(
            "the sampler dpm needs diffusers: pip install -c constraints.txt -e '.[vae]', or use the sampler ddim."
        ) from None
    return DPMSolverMultistepScheduler


def dpm(run: Run, x: Tensor) -> Tensor:
    """Integrate the probability-flow ODE with the second-order multistep solver for the predicted clean image.

    It converges to the same solution as DDIM, in fewer steps: the learned variance is ignored, and the last step, to
    zero noise, returns the predicted clean image as in DDIM.
    """
    first, last = BETAS
    scheduler = scheduler_class()(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="linear",
        beta_start=first,
        beta_end=last,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="epsilon",
        final_sigmas_type="zero",
    )
    timesteps_N = log_snr_steps(run.steps)
    scheduler.set_timesteps(timesteps=timesteps_N.tolist(), device="cpu")
    scheduler.set_begin_index(0)  # otherwise the first step searches for its timestep
    on_device_N = torch.from_numpy(timesteps_N).to(x.device)
    for i, timestep in enumerate(timesteps_N.tolist()):
        prediction = run.field(x, on_device_N[i].expand(len(x)), timestep / TRAIN_STEPS)
        noise = prediction[:, : x.shape[1]].to(x.dtype)
        x = scheduler.step(noise, timestep, x, return_dict=False)[0]
        run.progress(i + 1, run.steps)
    return x


def log_snr_steps(steps: int) -> Table:
    """Return the timesteps of DPM-Solver++: nearly uniform in the logarithm of the signal-to-noise ratio.

    The solver extrapolates the clean image linearly in that variable (DPM-Solver, arXiv 2206.00927, section 3). Steps
    uniform in time grow so much toward the clean image that the extrapolation overshoots: with 20 steps on Gaussian
    data of standard deviation 0.5, the error was 24%, and 1.5% with these timesteps.

    Args:
        steps: N.

    Returns:
        int64, N distinct timesteps in descending order, from 999 to 0 if N > 1.
    """
    if steps == 1:
        return np.array([TRAIN_STEPS - 1])
    alphas_cumprod = dit_diffusion().alphas_cumprod_N
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))  # descends with the timestep
    wanted_N = np.linspace(log_snr[0], log_snr[-1], steps)
    timesteps = np.rint(np.interp(-wanted_N, -log_snr, np.arange(TRAIN_STEPS))).astype(np.int64)
    # Near the clean image, the wanted timesteps are less than 1 apart: take the next unused one.
    index_N = np.arange(steps)
    timesteps = np.maximum.accumulate(timesteps - index_N) + index_N
    ascending_N: Table = np.minimum(timesteps, TRAIN_STEPS - steps + index_N)
    return ascending_N[::-1].copy()
