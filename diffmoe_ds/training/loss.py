"""One scalar from a forward pass.  Legend: B images of a micro-batch, T its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.diffusion.objective import Objective
from diffmoe_ds.model.dit import DiTOutput
from diffmoe_ds.moe.capacity import capacity_loss


class Losses(NamedTuple):
    """Scalars, fp32; only ``total`` is differentiated."""

    total: Tensor
    """diffusion + capacity_weight * capacity + balance_weight * balance."""
    diffusion: Tensor
    """The objective's loss, mean over images."""
    capacity: Tensor
    """The capacity predictors' loss, mean per layer, summed over layers."""
    balance: Tensor
    """The load-balance loss of ``token_choice``, summed over layers."""


def training_loss(output: DiTOutput, batch: MicroBatch, t_B: Tensor, objective: Objective, config: Config) -> Losses:
    """The training loss of a micro-batch.

    Args:
        output: what the model predicted and routed.
        batch: clean images and their noise.
        t_B: the model's time of each image.
        objective: flow or DDPM.
        config: for the weights of the parts.
    """
    diffusion = objective.loss(output.prediction, batch.x, batch.noise, t_B)["loss_B"].float().mean()
    zero = torch.zeros_like(diffusion)
    capacity = sum(
        (capacity_loss(r.capacity_logits_TE, r.mask_TE) for r in output.routing if r.capacity_logits_TE is not None),
        start=zero,
    )
    balance = sum((r.balance_loss for r in output.routing if r.balance_loss is not None), start=zero)
    routing = config.routing
    total = diffusion + routing.capacity_weight * capacity + routing.balance_weight * balance
    return Losses(total, diffusion.detach(), capacity.detach(), balance.detach())
