"""Training loss of a micro-batch: noise the images, run the model, weight the losses.

Legend: B images of a micro-batch, S tokens of an image, T image features, F their width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ds.config.routing import AUXILIARY
from diffmoe_ds.config.schema import Config, ObjectiveConfig
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.diffusion.objective import Objective
from diffmoe_ds.diffusion.times import logit_normal, shifted
from diffmoe_ds.model.dit import DiTOutput
from diffmoe_ds.model.layers import unpatchify
from diffmoe_ds.moe.capacity import capacity_loss
from diffmoe_ds.training.setup import Run


class Losses(NamedTuple):
    """Scalars, fp32; only ``total`` is differentiated."""

    total: Tensor
    """diffusion, and the others multiplied by their weights, added up."""
    diffusion: Tensor
    """The objective's loss, mean over images."""
    capacity: Tensor
    """The capacity predictors' loss, mean per layer, summed over layers."""
    alignment: Tensor
    """The alignment loss of REPA."""
    # those of the MoE layers (`config.routing.AUXILIARY`), each summed over layers; 0 where its weight is
    balance: Tensor
    z: Tensor
    orthogonality: Tensor
    contrastive: Tensor
    similarity: Tensor
    per_layer: Tensor


def model_inputs(run: Run, batch: MicroBatch) -> tuple[Tensor, ...]:
    """Return the model's inputs for a micro-batch: noisy images, times, labels or text features, and drop flags."""
    t_B = run.objective.model_time(training_times(batch.time, run.config.objective))
    return run.objective.corrupt(batch.x, batch.noise, t_B), t_B, batch.condition, batch.drop


def training_times(uniform_B: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Return the times at which images are trained, from uniform draws."""
    times_B = uniform_B
    if objective.time_distribution == "logit_normal":
        times_B = logit_normal(times_B, objective.time_mean, objective.time_std)
    return times_B if objective.time_shift == 1 else shifted(times_B, objective.time_shift)


def forward(run: Run, model: nn.Module, batch: MicroBatch) -> tuple[DiTOutput, Losses, Tensor]:
    """Run a micro-batch through a model.

    Args:
        run: for the objective and the weights of the losses.
        model: the run's engine, or the model inside it.
        batch: clean images, their noise, times and labels.

    Returns:
        The model's output, its losses, and the model's time of each image, [B].
    """
    inputs = model_inputs(run, batch)
    output = model(*inputs)
    return output, training_loss(output, batch, inputs[1], run.objective, run.config), inputs[1]


def training_loss(output: DiTOutput, batch: MicroBatch, t_B: Tensor, objective: Objective, config: Config) -> Losses:
    """Return the training losses of a micro-batch.

    Args:
        output: the model's predictions and routing.
        batch: clean images and their noise.
        t_B: the model's time of each image.
        objective: flow or DDPM.
        config: for the loss weights.
    """
    diffusion = objective.loss(output.prediction, batch.x, batch.noise, t_B)["loss_B"].float().mean()
    zero = torch.zeros_like(diffusion)
    capacity = sum(
        (capacity_loss(r.capacity_logits_TE, r.mask_TE) for r in output.routing if r.capacity_logits_TE is not None),
        start=zero,
    )
    total = diffusion + config.routing.capacity_weight * capacity
    auxiliary = dict.fromkeys(AUXILIARY, zero)
    for name in config.auxiliary_losses:
        if name == "per_layer":
            target_BCHW = objective.target(batch.x, batch.noise)
            predictions = [routing.target_TP for routing in output.routing if routing.target_TP is not None]
            parts = [per_layer_loss(target_TP, target_BCHW, config) for target_TP in predictions]
        else:
            parts = [routing.auxiliary[name] for routing in output.routing]
        loss = sum(parts, start=zero)
        total = total + getattr(config.routing, f"{name}_weight") * loss
        auxiliary[name] = loss.detach()
    alignment = zero
    if output.aligned_BSF is not None and batch.features is not None:
        alignment = alignment_loss(output.aligned_BSF, batch.features)
        total = total + config.loss.repa_weight * alignment
    return Losses(total, diffusion.detach(), capacity.detach(), alignment.detach(), **auxiliary)


def per_layer_loss(target_TP: Tensor, target_BCHW: Tensor, config: Config) -> Tensor:
    """Return the mean squared error of a MoE layer's own prediction (Expert Race, arXiv 2503.16057).

    Args:
        target_TP: P values of a patch for each token.
        target_BCHW: the objective's target.
        config: for the patches.
    """
    patches_BSP = target_TP.float().unflatten(0, (len(target_BCHW), config.tokens_per_image))
    return F.mse_loss(unpatchify(patches_BSP, config.model.patch_size, config.model.in_channels), target_BCHW.float())


def alignment_loss(projected_BSF: Tensor, features_BTF: Tensor) -> Tensor:
    """Return the mean negative cosine similarity of projected tokens and image features (REPA, arXiv 2410.06940).

    Args:
        projected_BSF: of the tokens of an image, which form a square grid.
        features_BTF: of the image, also a square grid; resized to that of the tokens if they differ.
    """
    features_BTF = features_BTF.float()
    tokens, grid = projected_BSF.shape[1], math.isqrt(features_BTF.shape[1])
    if tokens != features_BTF.shape[1]:
        maps_BFHW = features_BTF.transpose(1, 2).unflatten(2, (grid, grid))
        side = math.isqrt(tokens)
        resized = F.interpolate(maps_BFHW, size=(side, side), mode="bilinear", antialias=True)
        features_BTF = resized.flatten(2).transpose(1, 2)
    return -F.cosine_similarity(projected_BSF.float(), features_BTF, dim=-1).mean()
