"""Distributions of the training times of rectified flow (0 is noise, 1 is data), as monotone maps of uniform draws.

A run therefore draws the same numbers under every distribution. Source of both: arXiv 2403.03206, sections 3.1 and
5.3.2, which count time from data to noise.

Legend: B images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal(uniform_B: Tensor, mean: float, std: float) -> Tensor:
    """Return times at which the logit of the noise level is normally distributed.

    Args:
        uniform_B: draws from [0, 1), float32 or wider.
        mean: of the logit of the noise level; above 0, more images are noisier than half.
        std: its standard deviation.

    Returns:
        [B] in [0, 1], of the same type.
    """
    normal_B = torch.special.ndtri(uniform_B.double())
    return torch.sigmoid(std * normal_B - mean).to(uniform_B.dtype)


def shifted(time_B: Tensor, shift: float) -> Tensor:
    """Return times whose odds of noise against data are multiplied by a factor.

    Args:
        time_B: times in [0, 1].
        shift: the factor; above 1, images are noisier.

    Returns:
        [B] in [0, 1].
    """
    return time_B / (time_B + shift * (1 - time_B))
