"""The mixture-of-experts layer: score, select, dispatch, compute, combine.

It knows nothing of ranks.  Who competes is its `pool`, where rows go is its `dispatcher`; the ones here stand
for a single process, and `moe/expert_parallel.py` puts those of a cluster in their place.

Legend: B images, S tokens per image, T = B * S tokens of this rank, D width, E experts, R routed rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.layers import FFN
from diffmoe_ds.moe.capacity import predicted, rows_per_expert
from diffmoe_ds.moe.experts import Experts
from diffmoe_ds.moe.plan import RoutePlan, make_plan
from diffmoe_ds.moe.routers.batch_pool import batch_pool, batch_pool_dynamic
from diffmoe_ds.moe.routers.expert_choice import expert_choice
from diffmoe_ds.moe.routers.token_choice import balance_loss, token_choice
from diffmoe_ds.moe.top_k import LocalPool, Pool


class Routing(NamedTuple):
    """What a layer routed, for losses, thresholds and reports; everything but the losses is detached."""

    mask_TE: Tensor
    """bool: which expert took which token."""
    capacity_logits_TE: Tensor | None
    """The capacity predictor's logits, with gradient; none if the layer has no predictor."""
    balance_loss: Tensor | None
    """Scalar with gradient; only ``token_choice`` in training."""


class LocalDispatcher:
    """All experts are in this process: rows stay where they are."""

    def dispatch(self, rows_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, list[int], Any]:
        """Rows for the experts held here, rows per expert, and what `combine` needs to send them back."""
        return rows_RD, rows_E.tolist(), None

    def combine(self, rows_RD: Tensor, sent: Any) -> Tensor:
        """The experts' rows in the order in which `dispatch` was given them."""
        return rows_RD


class MoELayer(nn.Module):
    """Experts in the place of a block's FFN."""

    def __init__(self, config: Config, width: int, num_local_experts: int | None = None) -> None:
        """Build without initial values; see `model/init.py`.

        Args:
            config: the run's configuration.
            width: D.
            num_local_experts: how many of the experts this process holds; none: all.
        """
        nn.Module.__init__(self)  # not super(): the cluster's layer has a second base with its own arguments
        routing, model = config.routing, config.model
        self.num_experts = config.num_experts
        self.kind = routing.kind
        self.capacity = routing.capacity
        self.tokens_per_image = config.tokens_per_image
        hidden = int(width * model.mlp_ratio)
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, width))
        self.experts = Experts(model.mlp, num_local_experts or self.num_experts, width, hidden)
        self.shared_experts = FFN[model.mlp](width, hidden * routing.shared_experts) if routing.shared_experts else None
        self.capacity_predictor = None
        if config.has_capacity_predictor:
            self.capacity_predictor = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self.num_experts)
            )
            self.register_buffer("expert_threshold", torch.empty(self.num_experts, dtype=torch.float32))
        self.even_in_training = routing.kind in ("batch_pool", "expert_choice")  # by rule, on every rank
        self.inference = "static"
        self.pool: Pool = LocalPool()
        self.dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """[B, S, D] to [B, S, D], and what was routed."""
        tokens_TD = x_BSD.flatten(0, 1)
        scores_TE = F.linear(tokens_TD.float(), self.gate_weight.float()).softmax(dim=-1)
        logits_TE = None
        if self.capacity_predictor is not None:
            logits_TE = self.capacity_predictor(tokens_TD.detach())
        with torch.no_grad():
            mask_TE = self._select(scores_TE, logits_TE)
        balance = None
        if self.kind == "token_choice" and self.training:
            balance = balance_loss(scores_TE, mask_TE, self.pool)
        out_TD = self._compute(tokens_TD, make_plan(mask_TE, scores_TE))
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(tokens_TD)
        return out_TD.unflatten(0, x_BSD.shape[:2]), Routing(mask_TE, logits_TE, balance)

    def _select(self, scores_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
        """bool mask_TE by the router's rule: the training rule, or the inference choice in eval mode."""
        choice = "static" if self.training else self.inference
        if self.kind == "token_choice":
            return token_choice(scores_TE, int(self.capacity))
        if choice == "per_token":
            return predicted(logits_TE, self.expert_threshold)
        if self.kind == "batch_pool":
            if choice == "dynamic":
                return batch_pool_dynamic(scores_TE, logits_TE, self.expert_threshold, self.pool)
            return batch_pool(scores_TE, self.capacity, self.pool)
        assert self.kind == "expert_choice"
        images = scores_TE.shape[0] // self.tokens_per_image
        if choice == "dynamic":
            above_TE = predicted(logits_TE, self.expert_threshold)
            rows_BE = above_TE.unflatten(0, (images, self.tokens_per_image)).sum(1)
        else:
            rows = rows_per_expert(self.capacity, self.tokens_per_image, self.num_experts)
            rows_BE = torch.full((images, self.num_experts), rows, device=scores_TE.device)
        return expert_choice(scores_TE, self.tokens_per_image, rows_BE)

    def _compute(self, tokens_TD: Tensor, plan: RoutePlan) -> Tensor:
        """Every routed row through its expert, weighted and summed per token in fp32."""
        rows_RD, rows_E, sent = self.dispatcher.dispatch(tokens_TD[plan.token_R], plan.rows_E)
        even = self.even_in_training if self.training else len(set(rows_E)) == 1
        out_RD = self.dispatcher.combine(self.experts(rows_RD, rows_E, even), sent)
        weighted_RD = out_RD.float() * plan.weight_R[:, None]
        out_TD = torch.zeros(tokens_TD.shape, dtype=torch.float32, device=tokens_TD.device)
        return out_TD.index_add(0, plan.token_R, weighted_RD).to(tokens_TD.dtype)
