"""Rectified flow (Liu et al., arXiv 2209.03003): straight paths from noise (time 0) to data (time 1).

The first two functions are conventions that all of `diffusion` and `sampling` share.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` itself if float32 or float64, otherwise a float32 copy.

    No loss or sampler step runs in half precision.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_image(values_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return one value per image as [B, 1, 1, 1], which broadcasts against the images."""
    assert values_B.shape == x_BCHW.shape[:1], f"one value per image: {values_B.shape} for {x_BCHW.shape}"
    return values_B.reshape(-1, 1, 1, 1)


def flow_interpolate(x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Return the point of the straight path at time t: ``t * x + (1 - t) * noise`` (arXiv 2209.03003, section 2).

    Args:
        x_BCHW: clean images, any float dtype.
        noise_BCHW: standard normal noise.
        t_B: times in [0, 1]; the model is given the same numbers, unscaled.

    Returns:
        [B, C, H, W], float32 or wider.
    """
    x, noise = at_least_float32(x_BCHW), at_least_float32(noise_BCHW)
    t = per_image(t_B.to(x.dtype), x)
    return t * x + (1 - t) * noise


def flow_loss(model_output_BCHW: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Return the squared error of the predicted velocity against ``x - noise`` (arXiv 2209.03003, eq. 1).

    Args:
        model_output_BCHW: the predicted velocity.
        x_BCHW: clean images.
        noise_BCHW: the noise that was mixed in. All any float dtype; the error is computed in float32 or wider.

    Returns:
        loss_B: the mean over C, H and W of each image.
    """
    assert model_output_BCHW.shape == x_BCHW.shape == noise_BCHW.shape
    velocity = at_least_float32(x_BCHW) - at_least_float32(noise_BCHW)
    return (at_least_float32(model_output_BCHW) - velocity).square().flatten(1).mean(1)
