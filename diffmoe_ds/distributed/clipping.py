"""Gradient clipping over dense and expert-parallel parameters that are not partitioned (ZeRO 0)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

from diffmoe_ds.distributed.collectives import Group, all_reduce


def clip_gradients(
    parameters: Iterable[nn.Parameter], experts: Collection[int], ep_group: Group | None, max_norm: float
) -> float:
    """Clip all gradients to a global norm. Every rank must call this.

    Args:
        parameters: of the model on this rank.
        experts: ``id`` of those that are expert weights; their squares are summed over the EP group.
        ep_group: the EP group; None if there are no experts.
        max_norm: the norm to clip to; 0 disables clipping.

    Returns:
        The global 2-norm of the gradient before clipping; the same on all ranks.
    """
    gradients = [(id(p) in experts, p.grad) for p in parameters if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=gradients[0][1].device)  # dense, experts held here
    for is_expert, gradient in gradients:
        squares[int(is_expert)] += gradient.detach().double().square().sum()
    if ep_group is not None:
        all_reduce(squares[1:], group=ep_group)
    norm = squares.sum().sqrt().item()
    if 0 < max_norm < norm < math.inf:
        torch._foreach_mul_([gradient for _, gradient in gradients], max_norm / norm)
    return norm
