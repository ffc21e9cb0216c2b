"""The thresholds tau above which the capacity predictor's probability assigns a token to an expert.

tau <- decay * tau + (1 - decay) * (K-th largest probability in the pool), once per optimizer step and outside the
forward pass, so that recomputed activations are not counted twice. The search runs before the backward pass, so that
its verdict reaches the host together with the losses.

Legend: M micro-batches of a step, L MoE layers, E experts, N = M * L * E, T tokens of this rank, K tokens of an expert
over the pool.
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
        self._warm_start = WarmStart(verify_later=True)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Keep the logits of one micro-batch for the search."""
        logits = [r.capacity_logits_TE for r in routings if r.capacity_logits_TE is not None]
        if logits:
            self._observed.append(torch.cat(logits, dim=1))

    def retract(self) -> None:
        """Forget the last micro-batch, whose forward pass is repeated."""
        del self._observed[-1:]

    @torch.no_grad()
    def search(self) -> Tensor | None:
        """Find the quantiles of all layers and micro-batches observed since the last update, with one search.

        Returns:
            fp32 scalar, the same on every rank: 1 if the search was inconclusive and has to be repeated, 0 if not; None
            if it was exact in any case.
        """
        if not self._observed:
            return None
        self._logits_TN = torch.cat(self._observed, dim=1)
        self._quantile_N = self._quantile()
        inconclusive = self._warm_start.inconclusive
        return None if inconclusive is None else inconclusive.float()

    @torch.no_grad()
    def update(self, is_inconclusive: bool) -> None:
        """Move the thresholds towards the mean quantile of the micro-batches since the last update.

        Args:
            is_inconclusive: whether `search` returned 1.
        """
        if not self._observed:
            return
        if is_inconclusive:
            self._warm_start.forget()
            self._quantile_N = self._quantile()
        quantile_MLE = self._quantile_N.view(len(self._observed), len(self._layers), -1)
        for layer, quantile_E in zip(self._layers, quantile_MLE.mean(0), strict=True):
            layer.expert_threshold.lerp_(quantile_E, 1 - self._decay)
        self._observed.clear()

    def discard(self) -> None:
        """Discard the micro-batches observed since the last update, for a skipped step."""
        self._observed.clear()
        self._warm_start.forget()

    def _quantile(self) -> Tensor:
        pool, num_experts = self._layers[0].pool, self._layers[0].num_experts
        k = tokens_per_expert(self._capacity, len(self._logits_TN) * pool.size, num_experts)
        return pool_quantile(self._logits_TN, k, pool, self._warm_start)
