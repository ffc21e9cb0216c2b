"""Routing statistics of one micro-batch over all ranks.

Legend: L MoE layers, E experts, T tokens, B images of this rank, N noise-level bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ds.diffusion.objective import NOISE_BINS, noise_bin
from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.moe.layer import Routing


@dataclass(frozen=True)
class RoutingReport:
    """Routing statistics of one micro-batch over all ranks."""

    load_LE: Tensor
    """Tokens per expert divided by the layer's mean; 1 is balanced."""
    taken_LT: Tensor
    """Fraction of tokens routed to 0, 1, ..., E experts, [L, E + 1]."""
    capacity_LN: Tensor
    """Mean number of experts per token, by the noise level of the image; NaN for a bin without images."""


@torch.no_grad()
def routing_report(routings: tuple[Routing, ...], noise_level_B: Tensor) -> RoutingReport:
    """Count the routing of all ranks.  Every rank must call this.

    Args:
        routings: the routing of each MoE layer on this rank.
        noise_level_B: the noise level of each image, in [0, 1].
    """
    images, experts = len(noise_level_B), routings[0].mask_TE.shape[1]
    bin_B = noise_bin(noise_level_B)
    layers = []
    for routing in routings:
        taken_T = routing.mask_TE.sum(1)
        rows_E = routing.mask_TE.sum(0).double()
        taken = torch.bincount(taken_T, minlength=experts + 1).double()
        per_image_B = taken_T.view(images, -1).double().mean(1)
        sums_N = torch.zeros(NOISE_BINS, dtype=torch.float64, device=rows_E.device).index_add_(0, bin_B, per_image_B)
        counts_N = torch.bincount(bin_B, minlength=NOISE_BINS).double()
        layers.append(torch.cat([rows_E, taken, sums_N, counts_N]))
    counts = torch.stack(layers)
    all_reduce(counts)
    rows_LE, taken_LT, sums_LN, counts_LN = counts.cpu().split([experts, experts + 1, NOISE_BINS, NOISE_BINS], dim=1)
    return RoutingReport(
        load_LE=rows_LE / rows_LE.mean(1, keepdim=True),
        taken_LT=taken_LT / taken_LT.sum(1, keepdim=True),
        capacity_LN=sums_LN / counts_LN,
    )
