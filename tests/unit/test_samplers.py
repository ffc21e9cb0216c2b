"""The samplers that use a library or noise: dopri5, DPM-Solver++ and the reverse SDE."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from diffmoe_ds.diffusion.ddpm import TRAIN_STEPS, dit_diffusion
from diffmoe_ds.diffusion.objective import SAMPLERS
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.dopri5 import Tolerances
from diffmoe_ds.sampling.dpm import log_snr_steps
from diffmoe_ds.sampling.samplers import ADAPTIVE, FIXED_STEPS, STOCHASTIC, check_sampling, sample


def test_every_sampler_of_the_table_exists():
    assert {*FIXED_STEPS, *ADAPTIVE} == set(SAMPLERS) and set(STOCHASTIC) < set(SAMPLERS)


# -------------------------------------------------------------------------------------------------------- dopri5


def rough_velocity(x: Tensor, t_B: Tensor) -> Tensor:
    """A velocity that needs steps of very different sizes for images of different scale."""
    t = t_B.to(x.dtype)[:, None, None, None]
    return torch.sin(3 * x + 5 * t) * (1 + 4 * t) + x.flip(3) * torch.cos(9 * t)


def images_of_different_scale(dtype: torch.dtype) -> Tensor:
    z = torch.randn(4, 2, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return z * torch.tensor([1, 3, 0.1, 10], dtype=dtype)[:, None, None, None]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-5, 1e-5), (1e-2, 1e-3)])
def test_dopri5_is_torchdiffeq_for_every_image(dtype, error, rtol, atol):
    """The same image and evaluations as a separate call of `odeint`; a batch takes as many as its slowest image."""
    z, evaluations = images_of_different_scale(dtype), []

    def count(x, t_B):
        evaluations.append(len(x))
        return rough_velocity(x, t_B)

    expected, needed = [], []
    for image in z.split(1):
        evaluations.clear()
        times = torch.tensor([0.0, 1.0], dtype=dtype)
        path = odeint(lambda t, x: count(x, t.expand(1)), image, times, rtol=rtol, atol=atol, method="dopri5")
        expected.append(path[-1])
        needed.append(len(evaluations))
    evaluations.clear()
    images = sample(count, "dopri5", z, 50, tolerances=Tolerances(rtol, atol))
    torch.testing.assert_close(images, torch.cat(expected), rtol=error, atol=error)
    assert len(set(needed)) > 1 and evaluations == [4] * max(needed)


def test_dopri5_is_exact_for_a_constant_velocity():
    z = images_of_different_scale(torch.float32)
    for speed in (0.0, 1.0):
        images = sample(lambda x, t_B, speed=speed: torch.full_like(x, speed), "dopri5", z, 1)
        torch.testing.assert_close(images, z + speed, rtol=1e-5, atol=1e-5)
        images = sample(lambda x, t_B, speed=speed: torch.full_like(x, speed), "dopri5", 0 * z, 1)
        torch.testing.assert_close(images, torch.full_like(z, speed))


def test_dopri5_stops_where_a_velocity_is_not_finite():
    """Such an image is NaN, and its batch mates are what they would be without it."""
    z = images_of_different_scale(torch.float32)
    z[1] = 1e3

    def velocity(x, t_B):
        return rough_velocity(x, t_B) + torch.where(x > 900, torch.nan, 0.0)

    images = sample(velocity, "dopri5", z, 50)
    assert images[1].isnan().all()
    mates = [0, 2, 3]
    torch.testing.assert_close(images[mates], sample(velocity, "dopri5", z[mates], 50), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- sde


def gaussian_velocity(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity of the linear path to data N(mean, std^2): E[x_1 - x_0 | x_t]."""

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        t = t_B.to(x.dtype)[:, None, None, None]
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.3), (-1.0, 1.0)])
def test_sde_reproduces_gaussian_data(mean, std):
    """The velocity is linear, so every step's mean and variance are known; many steps give those of the data."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 150, 150, generator=generator)
    images = sample(gaussian_velocity(mean, std), "sde", z, 250, lambda: torch.randn(z.shape, generator=generator))

    center, variance, memory = 0.0, 1.0, 1.0  # of the samples, and the part of the initial noise that is left
    for i in range(250):
        t, h = i * 0.96 / 249, 0.96 / 249 if i < 249 else 0.04
        slope = (t * std**2 - (1 - t)) / ((t * std) ** 2 + (1 - t) ** 2)
        factor = 1 + h * ((1 + t) * slope - 1)
        center = factor * center + h * (1 + t) * mean * (1 - t * slope)
        variance = factor**2 * variance + (2 * (1 - t) * h if i < 249 else 0)
        memory *= factor
    assert center == pytest.approx(mean, abs=0.01) and math.sqrt(variance) == pytest.approx(std, rel=0.05)
    assert images.mean().item() == pytest.approx(center, abs=4 * std / 150)
    assert images.std().item() == pytest.approx(math.sqrt(variance), rel=4 / 150 / math.sqrt(2))
    kurtosis = ((images - images.mean()) / images.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.15)
    correlation = torch.corrcoef(torch.stack([images.flatten(), z.flatten()]))[0, 1].item()
    assert correlation == pytest.approx(memory / math.sqrt(variance), abs=0.03) and correlation < 0.6


def test_sde_takes_the_steps_of_sit():
    """Equal steps up to 0.96 with noise of variance 2 (1 - t) dt, then one without noise."""
    z, noises = torch.full((1, 1, 1, 1), 2.0), iter(torch.tensor([0.5, -1.0]).view(2, 1, 1, 1, 1))
    images = sample(lambda x, t_B: torch.full_like(x, 3.0), "sde", z, 3, noises.__next__)
    x = 2.0
    for t, noise in ((0.0, 0.5), (0.48, -1.0)):
        x = x + ((1 + t) * 3 - x) * 0.48 + math.sqrt(2 * (1 - t) * 0.48) * noise
    assert images.item() == pytest.approx(x + (1.96 * 3 - x) * 0.04, rel=1e-5)
    with pytest.raises(StopIteration):
        next(noises)


# ----------------------------------------------------------------------------------------------------------- dpm


def gaussian_noise(std_C: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact noise prediction for data N(0, std^2), with a learned variance that must be ignored."""
    alphas_cumprod = torch.from_numpy(dit_diffusion().alphas_cumprod_N)

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        alpha_bar = alphas_cumprod[t_B][:, None, None, None]
        noise = (1 - alpha_bar).sqrt() * x / (alpha_bar * std_C.view(-1, 1, 1) ** 2 + 1 - alpha_bar)
        return torch.cat([noise.to(x.dtype), torch.full_like(x, 7.0)], dim=1)

    return predict


def test_dpm_converges_to_the_solution_of_ddim():
    """Both converge to the probability-flow ODE of Gaussian data; DPM-Solver++ needs fewer steps, at second order."""
    std_C = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    z = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = dit_diffusion().alphas_cumprod_N[-1]
    exact = z * (std_C / (last * std_C**2 + 1 - last).sqrt()).view(3, 1, 1)
    model_fn = gaussian_noise(std_C)

    def error(sampler: str, steps: int, to: Tensor) -> float:
        return ((sample(model_fn, sampler, z, steps) - to).norm() / to.norm()).item()

    errors = {steps: error("dpm", steps, exact) for steps in (10, 20, 40, 80)}
    assert math.log2(errors[20] / errors[40]) == pytest.approx(2, abs=0.2) and errors[10] > 2 * errors[20], errors
    assert math.log2(errors[40] / errors[80]) == pytest.approx(2, abs=0.2), errors
    assert errors[20] < error("ddim", 100, exact), "twenty steps of DPM-Solver++ beat a hundred of DDIM"
    ddim = sample(model_fn, "ddim", z, TRAIN_STEPS)
    distances = [error("dpm", steps, ddim) for steps in (5, 10, 20, TRAIN_STEPS)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 5e-3, distances


def test_dpm_ends_at_the_predicted_clean_image_as_ddim_does():
    """The last step removes all noise that the model predicts, so one step is one step of DDIM."""
    std_C = torch.tensor([0.5, 1.0])
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    one = [sample(gaussian_noise(std_C), sampler, z, 1) for sampler in ("dpm", "ddim")]
    torch.testing.assert_close(*one, rtol=1e-3, atol=1e-4)


def test_timesteps_of_dpm():
    alphas_cumprod = dit_diffusion().alphas_cumprod_N
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    for steps in (1, 2, 3, 10, 50, 250, 999, 1000):
        timesteps = log_snr_steps(steps)
        assert len(timesteps) == steps and timesteps[0] == 999 and (np.diff(timesteps) < 0).all()
        assert timesteps[-1] == (0 if steps > 1 else 999)
    assert log_snr_steps(10).dtype == np.int64
    gaps = np.diff(log_snr[log_snr_steps(10)])
    assert gaps.max() / gaps.min() < 1.2


def test_missing_diffusers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"the sampler dpm needs diffusers: pip install .*\[vae\]"):
        check_sampling("ddpm", "dpm", 10, prefix="--")
    check_sampling("ddpm", "ddim", 10)
