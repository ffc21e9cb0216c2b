"""The thresholds tau above which the capacity predictor's probability assigns a token to an expert.

tau <- decay * tau + (1 - decay) * (K-th largest probability in the pool), once per optimizer step and outside the
forward pass, so that recomputed activations are not counted twice.

Legend: M micro-batches of a step, L MoE layers, E experts, N = M * L * E, T tokens of this rank, K tokens of an expert over the pool.
Source: DiffMoE (arXiv 2503.14487), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffmoe_ds.config.schema import RoutingConfig
from diffmoe_ds.moe.capacity import pool_quantile, tokens_per_expert
from diffmoe_ds.moe.layer import MoELayer, Routing
from diffmoe_ds.moe.search import WarmStart


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
        self._observed: list[Tensor] = []
        self._warm_start = WarmStart()

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Keep the logits of one micro-batch for the update."""
        logits = [r.capacity_logits_TE for r in routings if r.capacity_logits_TE is not None]
        if logits:
            self._observed.append(torch.cat(logits, dim=1))

    def discard(self) -> None:
        """Discard the micro-batches observed since the last update, for a skipped step."""
        self._observed.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Move the thresholds towards the mean quantile of the micro-batches since the last update.

        One search finds the quantiles of all layers and micro-batches.
        """
        if not self._observed:
            return
        logits_TN = torch.cat(self._observed, dim=1)
        pool, num_experts = self._layers[0].pool, self._layers[0].num_experts
        k = tokens_per_expert(self._capacity, len(logits_TN) * pool.size, num_experts)
        quantile_MLE = pool_quantile(logits_TN, k, pool, self._warm_start).view(len(self._observed), -1, num_experts)
        self._observed.clear()
        for layer, quantile_E in zip(self._layers, quantile_MLE.mean(0), strict=True):
            layer.expert_threshold.lerp_(quantile_E, 1 - self._decay)
