"""The thresholds tau above which the capacity predictor's probability assigns a token to an expert.

tau <- decay * tau + (1 - decay) * (K-th largest probability in the pool), once per optimizer step and outside the
forward pass, so that recomputed activations are not counted twice.

Legend: L MoE layers, E experts, N = L * E, T tokens of this rank, K tokens of an expert over the pool.
Source: DiffMoE (arXiv 2503.14487), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffmoe_ds.config.schema import RoutingConfig
from diffmoe_ds.moe.capacity import pool_quantile, tokens_per_expert
from diffmoe_ds.moe.layer import MoELayer, Routing


class Thresholds:
    """Updates the thresholds of all layers of a model."""

    def __init__(self, layers: Iterable[MoELayer], routing: RoutingConfig) -> None:
        """Collect the layers.

        Args:
            layers: all MoE layers of a model, in the order of its blocks (``model.moe_layers().values()``).
            routing: for the capacity and the decay.
        """
        self._layers = [layer for layer in layers if layer.capacity_predictor is not None]
        self._decay = routing.threshold_decay
        self._capacity = routing.capacity
        self._quantiles: list[Tensor] = []

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Record the pool's quantiles of one micro-batch, with one search for all layers."""
        if not self._layers:
            return
        logits = [r.capacity_logits_TE.float() for r in routings if r.capacity_logits_TE is not None]
        logits_TN = torch.cat(logits, dim=1)
        pool, num_experts = self._layers[0].pool, self._layers[0].num_experts
        k = tokens_per_expert(self._capacity, len(logits_TN) * pool.size, num_experts)
        self._quantiles.append(pool_quantile(logits_TN, k, pool).view(-1, num_experts))

    def discard(self) -> None:
        """Discard the quantiles recorded since the last update, for a skipped step."""
        self._quantiles.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Move the thresholds towards the mean quantile of the micro-batches since the last update."""
        if not self._layers:
            return
        quantile_LE = torch.stack(self._quantiles).mean(0)
        self._quantiles.clear()
        for layer, quantile_E in zip(self._layers, quantile_LE, strict=True):
            layer.expert_threshold.lerp_(quantile_E, 1 - self._decay)
