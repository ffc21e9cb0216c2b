"""Validation loss by noise level, on held-out images with fixed noise and times.

Legend: B images of a batch, N noise-level bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.diffusion.objective import NOISE_BINS, Objective, noise_bin
from diffmoe_ds.model.dit import DiT, DiTOutput


@dataclass(frozen=True)
class ValidationLoss:
    """The objective's loss on held-out images."""

    images: int
    """Number of images."""
    mean: float
    """Mean over the images."""
    by_noise_level: tuple[float, ...]
    """Mean over the images of each of `NOISE_BINS` equal bins, from clean to noise; NaN for a bin without images."""


@torch.inference_mode()
def validation_loss(
    model: DiT,
    objective: Objective,
    batches: Iterable[MicroBatch],
    num_images: int,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> ValidationLoss:
    """Compute the training loss without the balance and capacity losses.

    Unless images compete for experts (`DiT.images_compete`), the result does not depend on the batches, the ranks or
    the expert placement, except for rounding.

    Args:
        model: in eval mode, with the inference rule to measure.
        objective: the model's.
        batches: held-out images or latents of this process, such as `HeldOut.batches`; rows whose position is
            `num_images` or more are ignored.
        num_images: number of images over all ranks.
        reduce: sums a float64 tensor over the ranks, such as `collectives.all_reduce`; the default is for one process.
    """
    device = model.pos_embed.device
    sums_2N = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=device)
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        t_B = objective.model_time(batch.time)
        output: DiTOutput = model(objective.corrupt(batch.x, batch.noise, t_B), t_B, batch.condition)
        loss_B = objective.loss(output.prediction, batch.x, batch.noise, t_B)["loss_B"].double()
        is_real_B = batch.position < num_images
        values_2B = torch.stack([loss_B.where(is_real_B, 0), is_real_B.double()])
        sums_2N.index_add_(1, noise_bin(objective.noise_level(t_B)), values_2B)
    sum_N, count_N = reduce(sums_2N).cpu()
    return ValidationLoss(
        images=int(count_N.sum()),
        mean=float(sum_N.sum() / count_N.sum()),
        by_noise_level=tuple((sum_N / count_N).tolist()),
    )
