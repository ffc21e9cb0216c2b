"""Gaussian diffusion with noise prediction and a learned variance, as DiT trains and samples it.

Sources: DDPM (arXiv 2006.11239), Improved DDPM (2102.09672) for the learned variance and the shortened process,
DDIM (2010.02502), DiT (2212.09748) for the choice among their options: 1000 linear betas, loss = MSE of the noise
+ the unscaled variational term, whose gradient reaches only the variance.

Shapes: B images, C channels of the latent, H, W; N steps of a process.  A model's output has 2C channels: the noise,
then one number per element that places the variance between its two bounds.  A step index t is 0 for the last, least
noisy step.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.diffusion.flow import at_least_float32, per_image
from diffmoe_ds.errors import ConfigError

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class PMeanVariance:
    """The model's Gaussian p(x_{t-1} | x_t) and the clean image it implies; all [B, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


@dataclass(frozen=True)
class DDPMLosses:
    """Per-image losses, all [B] float32: ``loss_B = mse_B + vb_B``, ``vb_B`` in bits per dimension."""

    loss_B: Tensor
    mse_B: Tensor
    vb_B: Tensor


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A diffusion process as float64 tables over its N steps.  Build one with `from_betas` or `dit_diffusion`.

    ``timesteps_N`` is what the model is given at each step: 0..N-1 for the process it is trained on, a subset of
    those for a process shortened by `respaced`.  Everywhere else ``t_B`` (int64) is the step index 0..N-1 itself.
    """

    timesteps_N: np.ndarray
    betas_N: np.ndarray
    alphas_cumprod_N: np.ndarray
    sqrt_alphas_cumprod_N: np.ndarray
    sqrt_one_minus_alphas_cumprod_N: np.ndarray
    sqrt_alphas_cumprod_prev_N: np.ndarray
    one_minus_alphas_cumprod_prev_N: np.ndarray
    posterior_mean_xstart_N: np.ndarray
    posterior_mean_xt_N: np.ndarray
    log_betas_N: np.ndarray
    posterior_variance_N: np.ndarray
    posterior_log_variance_N: np.ndarray

    @classmethod
    def from_betas(cls, betas_N: np.ndarray, timesteps_N: np.ndarray) -> "GaussianDiffusion":
        """Derive all tables from the noise added per step (DDPM, Eq. 4 and 7).

        The posterior variance of step 0 is zero; its logarithm is taken from step 1 (Improved DDPM does the same),
        or from beta when there is no step 1.
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
            posterior_variance_N=posterior_variance,
            posterior_log_variance_N=np.log(positive_variance),
        )

    @property
    def num_steps(self) -> int:
        return len(self.betas_N)

    def respaced(self, steps: int | str) -> "GaussianDiffusion":
        """A shorter process over a subset of these steps, with the same marginals at each (Improved DDPM, section 4).

        ``steps``: see `spaced_steps`, which raises ConfigError.
        """
        kept_N = spaced_steps(self.num_steps, steps)
        alphas_cumprod = self.alphas_cumprod_N[kept_N]
        betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return GaussianDiffusion.from_betas(betas, self.timesteps_N[kept_N])

    def model_timesteps(self, t_B: Tensor) -> Tensor:
        """The timesteps that the model was trained on, int64 [B], for the step indices ``t_B``."""
        return _device_table(self, "timesteps_N", t_B.device, torch.int64)[t_B]

    def q_sample(self, xstart_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Noisy images x_t (DDPM, Eq. 4), [B, C, H, W], float32 or wider."""
        x, noise = at_least_float32(xstart_BCHW), at_least_float32(noise_BCHW)
        signal, sigma = self._at("sqrt_alphas_cumprod_N", t_B, x), self._at("sqrt_one_minus_alphas_cumprod_N", t_B, x)
        return signal * x + sigma * noise

    def q_posterior_mean(self, xstart_BCHW: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 7); its log variance is the table ``posterior_log_variance_N``."""
        return (
            self._at("posterior_mean_xstart_N", t_B, xt_BCHW) * xstart_BCHW
            + self._at("posterior_mean_xt_N", t_B, xt_BCHW) * xt_BCHW
        )

    def p_mean_variance(
        self, model_output: Tensor, xt_BCHW: Tensor, t_B: Tensor, clip_denoised: bool = False
    ) -> PMeanVariance:
        """The step that the model predicts, from its output [B, 2C, H, W] at ``xt_BCHW``.

        The variance interpolates between beta and the posterior variance in the log domain (Improved DDPM, Eq. 15;
        the model's numbers run from -1 to 1 instead of 0 to 1).  ``clip_denoised`` limits the implied clean image to
        [-1, 1]: right for pixels, wrong for latents, whose range it is not.
        """
        xt = at_least_float32(xt_BCHW)
        noise, fraction = _split(model_output, xt)
        signal, sigma = self._at("sqrt_alphas_cumprod_N", t_B, xt), self._at("sqrt_one_minus_alphas_cumprod_N", t_B, xt)
        xstart = (xt - sigma * noise) / signal
        if clip_denoised:
            xstart = xstart.clamp(-1, 1)
        low, high = self._at("posterior_log_variance_N", t_B, xt), self._at("log_betas_N", t_B, xt)
        log_variance = torch.lerp(low, high, (fraction + 1) / 2)
        return PMeanVariance(self.q_posterior_mean(xstart, xt, t_B), log_variance.exp(), log_variance, xstart)

    def training_losses(self, model_output: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> DDPMLosses:
        """Losses of an output [B, 2C, H, W] for ``q_sample(x, t, noise)``; any floating dtypes, computed in float32.

        ``mse_B`` is DDPM's simple loss (Eq. 14).  ``vb_B`` is the term of the variational bound (Eq. 5) of step
        ``t``: KL(q || p), or at t = 0 the discretised negative log-likelihood.  Its predicted mean is detached
        (Improved DDPM, section 3.1), so it trains the variance alone.
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

    def ancestral_step(
        self, model_output: Tensor, xt_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor | None, clip_denoised: bool = False
    ) -> Tensor:
        """Draw x_{t-1} from p (DDPM, Algorithm 2).  Images at t = 0 get no noise; None gives none to any image."""
        p = self.p_mean_variance(model_output, xt_BCHW, t_B, clip_denoised)
        if noise_BCHW is None:
            return p.mean
        return torch.where(per_image(t_B, p.mean) == 0, p.mean, p.mean + (p.log_variance / 2).exp() * noise_BCHW)

    def ddim_step(
        self,
        model_output: Tensor,
        xt_BCHW: Tensor,
        t_B: Tensor,
        noise_BCHW: Tensor | None = None,
        eta: float = 0.0,
        clip_denoised: bool = False,
    ) -> Tensor:
        """x_{t-1} by DDIM, Eq. 12 with the sigma of Eq. 16.  ``eta`` 0 is deterministic and needs no noise.

        The learned variance is ignored.
        """
        assert eta == 0 or noise_BCHW is not None, "eta > 0 needs noise"
        xt = at_least_float32(xt_BCHW)
        xstart = self.p_mean_variance(model_output, xt, t_B, clip_denoised).pred_xstart
        # The noise that goes with the (possibly clipped) clean image, so that both describe the same x_t.
        signal, sigma = self._at("sqrt_alphas_cumprod_N", t_B, xt), self._at("sqrt_one_minus_alphas_cumprod_N", t_B, xt)
        noise = (xt - signal * xstart) / sigma
        # Eq. 16 with eta = 1 is the posterior's standard deviation, so both roots below come from float64 tables.
        variance = eta**2 * self._at("posterior_variance_N", t_B, xt)
        direction = (self._at("one_minus_alphas_cumprod_prev_N", t_B, xt) - variance).sqrt()
        mean = self._at("sqrt_alphas_cumprod_prev_N", t_B, xt) * xstart + direction * noise
        return mean if noise_BCHW is None else mean + variance.sqrt() * noise_BCHW

    def _at(self, table: str, t_B: Tensor, like_BCHW: Tensor) -> Tensor:
        return per_image(_device_table(self, table, t_B.device, like_BCHW.dtype)[t_B], like_BCHW)


def dit_diffusion() -> GaussianDiffusion:
    """The process DiT is trained on: 1000 steps, betas evenly spaced from 1e-4 to 0.02 (DDPM, section 4)."""
    return GaussianDiffusion.from_betas(np.linspace(1e-4, 0.02, TRAIN_STEPS), np.arange(TRAIN_STEPS))


def spaced_steps(num_steps: int, steps: int | str) -> np.ndarray:
    """Which of ``num_steps`` steps a shortened process keeps, ascending int64.

    ``10`` or ``"10"``: ten evenly spaced from the first to the last (Improved DDPM, section 4); a single step is the
    noisiest.  ``"ddim10"``: ten at a constant whole stride from 0 (DDIM, appendix D.2).  Raises ConfigError when the
    number is not in 1..num_steps, or no whole stride gives it.
    """
    match = re.fullmatch(r"(ddim)?([0-9]+)", str(steps))
    count = int(match[2]) if match else 0
    if not 1 <= count <= num_steps:
        raise ConfigError(f"steps is {steps!r}; valid is a whole number N from 1 to {num_steps}, or 'ddimN'.")
    if match[1]:
        stride = math.ceil(num_steps / count)
        kept_N = np.arange(0, num_steps, stride)
        if len(kept_N) != count:
            raise ConfigError(
                f"steps is {steps!r}, but no whole stride takes {count} of {num_steps} steps; "
                f"valid near it is 'ddim{len(kept_N)}', or {count} without 'ddim'."
            )
        return kept_N
    if count == 1:
        return np.array([num_steps - 1])
    # A running sum, not i * stride: they round ties (count 21) to different steps, and published samples use the sum.
    stride_N = np.full(count, (num_steps - 1) / (count - 1))
    stride_N[0] = 0.0
    return np.rint(np.cumsum(stride_N)).astype(np.int64)


def normal_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) in nats between elementwise Gaussians; the arguments broadcast."""
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (mean_q - mean_p).square() * (-log_variance_p).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability in nats that a Gaussian gives to the bin of width 2/255 around ``x`` (DDPM, Eq. 13).

    The bins at -1 and 1 reach to infinity.  Latents are not 8-bit pixels, so for them this is only the convention
    that published models were trained with.
    """
    inverse_std = (-log_variance / 2).exp()
    cdf_above = _tanh_normal_cdf(inverse_std * (x - mean + 1 / 255))
    cdf_below = _tanh_normal_cdf(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below))
    return probability.clamp(min=1e-12).log()


def _tanh_normal_cdf(z: Tensor) -> Tensor:
    """The normal distribution function in GELU's tanh form (arXiv 1606.08415), as in the published losses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _split(model_output: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The noise and the variance fraction of an output [B, 2C, H, W], each like the image."""
    B, C, H, W = like_BCHW.shape
    assert model_output.shape == (B, 2 * C, H, W), f"{tuple(model_output.shape)} is not [{B}, {2 * C}, {H}, {W}]"
    return model_output.to(like_BCHW.dtype).split(C, dim=1)


# Kept on the device: copying a table there at every use would wait for the GPU about ten times per training step.
@lru_cache(maxsize=256)
def _device_table(process: GaussianDiffusion, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the first use may be a preview image, the next one a training step
        return torch.from_numpy(getattr(process, name)).to(dtype).to(device)
