"""The thresholds tau that turn the capacity predictor's probability into "take" or "leave".

tau <- decay * tau + (1 - decay) * (K-th largest probability in the pool), once per optimizer step and outside
the forward pass, so that recomputed activations count nothing twice.
Legend: L MoE layers, E experts, T tokens of this rank, K rows of an expert over the pool.
Source: DiffMoE (arXiv 2503.14487), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe.capacity import pool_quantile, rows_per_expert
from diffmoe_ds.moe.layer import Routing


class Thresholds:
    """Moves the thresholds of all layers of a model."""

    def __init__(self, model: DiT) -> None:
        self._layers = [layer for layer in model.moe_layers().values() if layer.capacity_predictor is not None]
        self._decay = model.config.routing.threshold_decay
        self._capacity = model.config.routing.capacity
        self._quantiles: list[Tensor] = []

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Note the pool's quantile of one micro-batch; all layers in one search."""
        if not self._layers:
            return
        logits_TN = torch.cat([r.capacity_logits_TE.detach().float() for r in routings], dim=1)  # N = L * E
        pool, num_experts = self._layers[0].pool, self._layers[0].num_experts
        rows = rows_per_expert(self._capacity, logits_TN.shape[0] * pool.size, num_experts)
        self._quantiles.append(pool_quantile(logits_TN, rows, pool).view(-1, num_experts))

    def forget(self) -> None:
        """Drop what was noted since the last update: the step is skipped."""
        self._quantiles.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Move the thresholds by the mean quantile of the micro-batches since the last update."""
        if not self._layers:
            return
        quantile_LE = torch.stack(self._quantiles).mean(0)
        self._quantiles.clear()
        for layer, quantile_E in zip(self._layers, quantile_LE, strict=True):
            layer.expert_threshold.lerp_(quantile_E, 1 - self._decay)
