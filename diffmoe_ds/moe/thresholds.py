"""The thresholds tau above which the capacity predictor's probability assigns a token to an expert.

tau <- decay * tau + (1 - decay) * (K-th largest probability in the pool), once per optimizer step and outside the
forward pass, so that recomputed activations are not counted twice. The search runs before the backward pass, so that
its last message and its verdict travel with the losses: besides these, a step sends one message.

Legend: M micro-batches of a step, L MoE layers, E experts, N = M * L * E, T tokens of this rank, K tokens of an expert
over the pool, W ranks, X numbers that a rank sends.
Source: DiffMoE (arXiv 2503.14487), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffmoe_ds.config.schema import RoutingConfig
from diffmoe_ds.moe.capacity import pool_quantile, tokens_per_expert
from diffmoe_ds.moe.layer import MoELayer, Routing
from diffmoe_ds.moe.observed import Observed
from diffmoe_ds.moe.search import NearSearch, WarmStart, is_cut_off, start_near
from diffmoe_ds.moe.top_k import key_values, sort_keys


class Thresholds(Observed):
    """Updates the thresholds of all layers of a model."""

    def __init__(self, layers: Iterable[MoELayer], routing: RoutingConfig, world: int) -> None:
        """Collect the layers.

        Args:
            layers: all MoE layers of a model, in the order of its blocks (``model.moe_layers().values()``).
            routing: for the capacity and the decay.
            world: ranks of the run.
        """
        super().__init__()
        self._layers = [layer for layer in layers if layer.capacity_predictor is not None]
        self._decay = routing.threshold_decay
        self._capacity = routing.capacity
        self._world = world
        self._logits_TN = self._quantile_N = torch.empty(0)
        self._warm_start = WarmStart(verify_later=True)
        self._near: NearSearch | None = None
        self.attachment: Tensor | None = None
        """int32 [X]: what the caller sends to all ranks of the run after `search`; None if there is nothing."""

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Keep the logits of one micro-batch for the search."""
        logits = [r.capacity_logits_TE for r in routings if r.capacity_logits_TE is not None]
        if logits:
            self._observed.append(torch.cat(logits, dim=1))

    @torch.no_grad()
    def search(self) -> Tensor | None:
        """Search for the quantiles of all layers and micro-batches observed since the last update.

        Returns:
            fp32 scalar: positive on any rank if the search was inconclusive and has to be repeated, 0 on all if not;
            None if it was exact in any case.
        """
        if not self._observed:
            return None
        self._logits_TN = torch.cat(self._observed, dim=1)
        pool, last_N = self._layers[0].pool, self._warm_start.key_E
        is_pool_of_all = 1 < pool.size == self._world
        if not is_pool_of_all or last_N is None or len(last_N) != self._logits_TN.shape[1]:
            self._quantile_N = self._search_alone()
            inconclusive = self._warm_start.inconclusive
            return None if inconclusive is None else inconclusive.float()
        k_N = torch.full_like(last_N, self._tokens_per_expert(), dtype=torch.int64)
        self._near = start_near(sort_keys(self._logits_TN.float().sigmoid()), k_N, pool, last_N)
        self.attachment = self._near.table_EX.flatten()
        return is_cut_off(self._near.table_EX).float()

    @torch.no_grad()
    def update(self, is_inconclusive: bool, attachments_WX: Tensor | None = None) -> None:
        """Move the thresholds towards the mean quantile of the micro-batches since the last update.

        Args:
            is_inconclusive: whether `search` returned a positive number on any rank.
            attachments_WX: `attachment` of every rank; ignored if there was none.
        """
        if not self._observed:
            return
        if is_inconclusive:
            self._warm_start.forget()
            self._quantile_N = self._search_alone()
        elif self._near is not None:
            assert attachments_WX is not None, "the caller sends the attachment"
            found = self._near.finish(attachments_WX.unflatten(1, self._near.table_EX.shape))
            self._warm_start.key_E, self._quantile_N = found.key_E, key_values(found.key_E)
        quantile_MLE = self._quantile_N.view(len(self._observed), len(self._layers), -1)
        for layer, quantile_E in zip(self._layers, quantile_MLE.mean(0), strict=True):
            layer.expert_threshold.lerp_(quantile_E, 1 - self._decay)
        self._clear()

    def discard(self) -> None:
        """Discard the micro-batches observed since the last update, for a skipped step."""
        self._warm_start.forget()
        self._clear()

    def _clear(self) -> None:
        self._observed.clear()
        self._logits_TN = self._quantile_N = torch.empty(0)
        self._near = self.attachment = None

    def _search_alone(self) -> Tensor:
        """Search with messages of its own."""
        return pool_quantile(self._logits_TN, self._tokens_per_expert(), self._layers[0].pool, self._warm_start)

    def _tokens_per_expert(self) -> int:
        layer = self._layers[0]
        return tokens_per_expert(self._capacity, len(self._logits_TN) * layer.pool.size, layer.num_experts)
