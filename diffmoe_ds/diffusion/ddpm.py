"""Gaussian diffusion with noise prediction and a learned variance, as used by DiT.

Sources: DDPM (arXiv 2006.11239), Improved DDPM (2102.09672) for the learned variance and the shortened process, DDIM
(2010.02502), DiT (2212.09748) for the options: 1000 linear betas, loss = MSE of the noise + the
unscaled variational term, whose gradient reaches only the variance.

Legend: B images, C channels, H, W height and width, N steps of a process. A model's output has 2C channels: the noise,
then one number per element that places the variance between its two bounds. Step index t is 0 for the least noisy step,
the last one of sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffmoe_ds.diffusion.flow import at_least_float32, per_image
from diffmoe_ds.diffusion.likelihood import discretized_log_likelihood, normal_kl
from diffmoe_ds.errors import ConfigError

TRAIN_STEPS = 1000
"""Steps of the process that models are trained on."""

BETAS = (1e-4, 0.02)
"""Variances of the noise added by the first and last steps (DDPM, section 4)."""

Table = npt.NDArray[Any]


@dataclass(frozen=True)
class PMeanVariance:
    """The model's Gaussian p(x_{t-1} | x_t) and the clean image it implies; all [B, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


@dataclass(frozen=True)
class DDPMLosses:
    """Losses per image, all [B] float32: ``loss_B = mse_B + vb_B``, ``vb_B`` in bits per dimension."""

    loss_B: Tensor
    mse_B: Tensor
    vb_B: Tensor


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A diffusion process as float64 tables over its N steps, built by `from_betas` or `dit_diffusion`."""

    timesteps_N: Table
    """What the model is given at each step: 0..N-1 for the process it is trained on, a subset of those for a process
    shortened by `respaced`. Everywhere else, ``t_B`` (int64) is the step index 0..N-1."""
    betas_N: Table
    alphas_cumprod_N: Table
    sqrt_alphas_cumprod_N: Table
    sqrt_one_minus_alphas_cumprod_N: Table
    sqrt_alphas_cumprod_prev_N: Table
    one_minus_alphas_cumprod_prev_N: Table
    posterior_mean_xstart_N: Table
    posterior_mean_xt_N: Table
    log_betas_N: Table
    posterior_log_variance_N: Table

    @classmethod
    def from_betas(cls, betas_N: Table, timesteps_N: Table) -> GaussianDiffusion:
        """Derive all tables from the variance of the noise that each step adds (DDPM, eq. 4 and 7).

        The posterior variance of step 0 is zero; its logarithm is taken from step 1, as in Improved DDPM, or from beta
        in a process of one step.

        Args:
            betas_N: float64.
            timesteps_N: int64, what the model is given at each step.
        """
        assert betas_N.dtype == np.float64 and betas_N.shape == timesteps_N.shape
        alphas_cumprod = np.cumprod(1.0 - betas_N)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        posterior_variance = betas_N * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        positive_variance = np.append(posterior_variance[1] if len(betas_N) > 1 else betas_N[0], posterior_variance[1:])
        return cls(
            timesteps_N=timesteps_N,
            betas_N=betas_N,
            alphas_cumprod_N=alphas_cumprod,
            sqrt_alphas_cumprod_N=np.sqrt(alphas_cumprod),
            sqrt_one_minus_alphas_cumprod_N=np.sqrt(1.0 - alphas_cumprod),
            sqrt_alphas_cumprod_prev_N=np.sqrt(alphas_cumprod_prev),
            one_minus_alphas_cumprod_prev_N=1.0 - alphas_cumprod_prev,
            posterior_mean_xstart_N=betas_N * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
            posterior_mean_xt_N=(1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas_N) / (1.0 - alphas_cumprod),
            log_betas_N=np.log(betas_N),
            posterior_log_variance_N=np.log(positive_variance),
        )

    @property
    def num_steps(self) -> int:
        """Number of steps N."""
        return len(self.betas_N)

    def respaced(self, steps: int) -> GaussianDiffusion:
        """Return a shorter process over a subset of the steps, with the same marginals (Improved DDPM, section 4).

        Args:
            steps: its number of steps; see `spaced_steps`.

        Raises:
            ConfigError: the number is not in 1..N.
        """
        kept_N = spaced_steps(self.num_steps, steps)
        alphas_cumprod = self.alphas_cumprod_N[kept_N]
        betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return GaussianDiffusion.from_betas(betas, self.timesteps_N[kept_N])

    def model_timesteps(self, t_B: Tensor) -> Tensor:
        """Return the timesteps that the model was trained on, int64 [B], for the step indices ``t_B``."""
        return _device_table(self, "timesteps_N", t_B.device, torch.int64)[t_B]

    def q_sample(self, xstart_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Return noisy images x_t (DDPM, eq. 4).

        Args:
            xstart_BCHW: clean images, any float dtype.
            t_B: int64 step indices.
            noise_BCHW: standard normal noise.

        Returns:
            [B, C, H, W], float32 or wider.
        """
        x, noise = at_least_float32(xstart_BCHW), at_least_float32(noise_BCHW)
        signal, sigma = self._at("sqrt_alphas_cumprod_N", t_B, x), self._at("sqrt_one_minus_alphas_cumprod_N", t_B, x)
        return signal * x + sigma * noise

    def q_posterior_mean(self, xstart_BCHW: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7).

        The log variance is the table ``posterior_log_variance_N``.
        """
        return (
            self._at("posterior_mean_xstart_N", t_B, xt_BCHW) * xstart_BCHW
            + self._at("posterior_mean_xt_N", t_B, xt_BCHW) * xt_BCHW
        )

    def p_mean_variance(self, model_output: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> PMeanVariance:
        """Return the step that the model predicts.

        The variance interpolates between beta and the posterior variance in the log domain (Improved DDPM, eq. 15; the
        model's numbers run from -1 to 1 instead of 0 to 1).

        Args:
            model_output: [B, 2C, H, W] at ``xt_BCHW``.
            xt_BCHW: noisy images.
            t_B: int64 step indices.
        """
        xt = at_least_float32(xt_BCHW)
        noise, fraction = _split(model_output, xt)
        signal, sigma = self._at("sqrt_alphas_cumprod_N", t_B, xt), self._at("sqrt_one_minus_alphas_cumprod_N", t_B, xt)
        xstart = (xt - sigma * noise) / signal
        low, high = self._at("posterior_log_variance_N", t_B, xt), self._at("log_betas_N", t_B, xt)
        log_variance = torch.lerp(low, high, (fraction + 1) / 2)
        return PMeanVariance(self.q_posterior_mean(xstart, xt, t_B), log_variance.exp(), log_variance, xstart)

    def training_losses(self, model_output: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> DDPMLosses:
        """Score a prediction for ``q_sample(x, t, noise)``.

        ``mse_B`` is DDPM's simple loss (eq. 14). ``vb_B`` is the term of the variational bound (eq. 5) of step t:
        KL(q || p), or at t = 0 the discretized negative log-likelihood. Its predicted mean is detached (Improved DDPM,
        section 3.1), so it trains the variance alone.

        Args:
            model_output: [B, 2C, H, W].
            x_BCHW: clean images.
            noise_BCHW: the noise that was mixed in. All any float dtype; computed in float32 or wider.
            t_B: int64 step indices.
        """
        x, noise = at_least_float32(x_BCHW), at_least_float32(noise_BCHW)
        predicted, fraction = _split(model_output, x)
        mse_B = (predicted - noise).square().flatten(1).mean(1)

        xt = self.q_sample(x, t_B, noise)
        p = self.p_mean_variance(torch.cat([predicted.detach(), fraction], dim=1), xt, t_B)
        kl = normal_kl(
            self.q_posterior_mean(x, xt, t_B), self._at("posterior_log_variance_N", t_B, x), p.mean, p.log_variance
        )
        nll = -discretized_log_likelihood(x, p.mean, p.log_variance)
        nats = torch.where(per_image(t_B, x) == 0, nll, kl)
        vb_B = nats.flatten(1).mean(1) / math.log(2)
        return DDPMLosses(mse_B + vb_B, mse_B, vb_B)

    def min_snr_weight(self, t_B: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, gamma) / SNR (arXiv 2303.09556, eq. 1 for the prediction of noise), fp32 [B].

        Args:
            t_B: int64 step indices.
            gamma: the largest signal-to-noise ratio that counts fully, positive.
        """
        alpha_N = torch.as_tensor(self.alphas_cumprod_N)
        weight_N = (gamma * (1 - alpha_N) / alpha_N).clamp(max=1).float()
        return weight_N.to(t_B.device)[t_B]

    def ancestral_step(self, model_output: Tensor, xt_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor | None) -> Tensor:
        """Sample x_{t-1} from p (DDPM, algorithm 2).

        Args:
            model_output: [B, 2C, H, W] at ``xt_BCHW``.
            xt_BCHW: noisy images.
            t_B: int64 step indices.
            noise_BCHW: standard normal noise, ignored for images at t = 0; None adds no noise to any image.

        Returns:
            [B, C, H, W], float32 or wider.
        """
        p = self.p_mean_variance(model_output, xt_BCHW, t_B)
        if noise_BCHW is None:
            return p.mean
        return torch.where(per_image(t_B, p.mean) == 0, p.mean, p.mean + (p.log_variance / 2).exp() * noise_BCHW)

    def ddim_step(self, model_output: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return x_{t-1} by deterministic DDIM (eq. 12 with sigma = 0); the learned variance is ignored.

        Args:
            model_output: [B, 2C, H, W] at ``xt_BCHW``.
            xt_BCHW: noisy images.
            t_B: int64 step indices.

        Returns:
            [B, C, H, W], float32 or wider.
        """
        xt = at_least_float32(xt_BCHW)
        xstart = self.p_mean_variance(model_output, xt, t_B).pred_xstart
        signal, sigma = self._at("sqrt_alphas_cumprod_N", t_B, xt), self._at("sqrt_one_minus_alphas_cumprod_N", t_B, xt)
        noise = (xt - signal * xstart) / sigma  # from the clean image, not from the output, as in the reference
        direction = self._at("one_minus_alphas_cumprod_prev_N", t_B, xt).sqrt()
        return self._at("sqrt_alphas_cumprod_prev_N", t_B, xt) * xstart + direction * noise

    def _at(self, table: str, t_B: Tensor, like_BCHW: Tensor) -> Tensor:
        return per_image(_device_table(self, table, t_B.device, like_BCHW.dtype)[t_B], like_BCHW)


def dit_diffusion() -> GaussianDiffusion:
    """Return the process DiT is trained on: 1000 steps, betas evenly spaced from 1e-4 to 0.02 (DDPM, section 4)."""
    return GaussianDiffusion.from_betas(np.linspace(*BETAS, TRAIN_STEPS), np.arange(TRAIN_STEPS))


def check_steps(num_steps: int, steps: object, name: str = "steps") -> None:
    """Check the number of steps of a shortened process; ``name`` is its name in the message.

    Raises:
        ConfigError: the number is not an integer from 1 to ``num_steps``.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= num_steps:
        raise ConfigError(f"{name} must be an integer from 1 to {num_steps}, got {steps!r}.")


def spaced_steps(num_steps: int, steps: int) -> Table:
    """Return the steps that a shortened process keeps.

    Args:
        num_steps: N of the full process.
        steps: number of steps to keep: evenly spaced from the first to the last (Improved DDPM, section 4), or only
            the noisiest if 1.

    Returns:
        Ascending int64.

    Raises:
        ConfigError: the number is not in 1..N.
    """
    check_steps(num_steps, steps)
    if steps == 1:
        return np.array([num_steps - 1])
    # a running sum, not i * stride: they round ties (21 steps) differently, and published samples use the sum
    stride_N = np.full(steps, (num_steps - 1) / (steps - 1))
    stride_N[0] = 0.0
    return np.asarray(np.rint(np.cumsum(stride_N)).astype(np.int64))


def _split(model_output: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Split an output [B, 2C, H, W] into the noise and the variance fraction, each with the shape of the image."""
    B, C, H, W = like_BCHW.shape
    assert model_output.shape == (B, 2 * C, H, W), f"{tuple(model_output.shape)} is not [{B}, {2 * C}, {H}, {W}]"
    noise, fraction = model_output.to(like_BCHW.dtype).chunk(2, dim=1)
    return noise, fraction


@lru_cache(maxsize=256)
def _device_table(process: GaussianDiffusion, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a table as a tensor on the device; copying it at every use would synchronize ten times per step."""
    with torch.inference_mode(False):  # a preview may use the table first, and a training step afterwards
        table = torch.from_numpy(getattr(process, name))
        return table.to(dtype).to(device)
