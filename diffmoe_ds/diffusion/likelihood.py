"""The two terms of DDPM's variational bound: KL divergence and discretized log-likelihood of Gaussians."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """Return KL(q || p) in nats between elementwise Gaussians; the arguments broadcast."""
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (mean_q - mean_p).square() * (-log_variance_p).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability in nats that a Gaussian assigns to the bin of width 2/255 around x (DDPM, eq. 13).

    The bins at -1 and 1 extend to infinity. Latents are not 8-bit pixels; for them this is only the convention that
    published models were trained with.
    """
    inverse_std = (-log_variance / 2).exp()
    cdf_above = _tanh_normal_cdf(inverse_std * (x - mean + 1 / 255))
    cdf_below = _tanh_normal_cdf(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below))
    return probability.clamp(min=1e-12).log()


def _tanh_normal_cdf(z: Tensor) -> Tensor:
    """Return the normal CDF in GELU's tanh approximation (arXiv 1606.08415), as in the published losses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
