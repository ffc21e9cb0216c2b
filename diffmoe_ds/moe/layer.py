"""The mixture-of-experts layer: score, select, plan, dispatch, compute, combine.

The layer is the same on one rank and on many. Its `pool` defines which tokens compete and its `dispatcher` moves rows
to their experts; the defaults serve a single process, and `moe/expert_parallel.py` replaces them on a cluster.

Legend: B images, S tokens per image, T = B * S tokens of this rank, D width, E experts, R routed rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.layers import FFN
from diffmoe_ds.moe.auxiliary import auxiliary_losses
from diffmoe_ds.moe.bounded import BoundedDispatcher
from diffmoe_ds.moe.capacity import predicted_mask
from diffmoe_ds.moe.experts import Experts
from diffmoe_ds.moe.first_pass import remember
from diffmoe_ds.moe.logits import fp32_linear
from diffmoe_ds.moe.null_images import NullImages
from diffmoe_ds.moe.padding import PaddedDispatcher
from diffmoe_ds.moe.plan import Counts, Dispatcher, LocalDispatcher
from diffmoe_ds.moe.routers import (
    batch_pool_dynamic,
    batch_pool_static,
    expert_choice,
    expert_choice_dynamic,
    expert_choice_static,
    expert_race_static,
    token_choice,
)
from diffmoe_ds.moe.rows import combine_rows, gather_rows
from diffmoe_ds.moe.scores import Scored, output_weights, score_tokens
from diffmoe_ds.moe.search import Pool, WarmStart
from diffmoe_ds.moe.top_k import LocalPool, Selection, select_top_k


class Routing(NamedTuple):
    """Routing of a layer, for losses, thresholds and logs; everything but the losses is detached."""

    mask_TE: Tensor
    """bool: the tokens that each expert selected."""
    capacity_logits_TE: Tensor | None
    """The capacity predictor's logits, with gradient; None without a predictor, and in inference by ``static``."""
    weights_TE: Tensor
    """fp32: by what the output of an expert is multiplied where it takes the token."""
    auxiliary: dict[str, Tensor]
    """The losses of `moe.auxiliary` by name, scalars with gradient; only in training."""
    target_TP: Tensor | None
    """The layer's own prediction of the model's target, P values of a patch; only in training with
    ``routing.per_layer_weight``."""
    race_score: Tensor | None
    """fp32 scalar: the K-th largest score of the pool; only for ``expert_race`` by the training rule."""
    must_redo: Tensor | None
    """bool scalar: the output is invalid, so the pass must be repeated under `exact_dispatch`; None if it is always
    valid."""


class MoELayer(nn.Module):
    """Experts in place of a block's FFN."""

    expert_threshold: Tensor
    """fp32 [E], the thresholds tau; only with a capacity predictor."""
    correction_bias: Tensor
    """fp32 [E], added to scores when experts are chosen; only with ``routing.bias_rate``."""
    race_threshold: Tensor
    """fp32 [1], the score from which on an expert takes a token in inference; only for ``expert_race``."""

    def __init__(self, config: Config, width: int, num_local_experts: int | None = None) -> None:
        """Allocate the weights; `model/init.py` sets their values.

        Args:
            config: the run's configuration.
            width: D.
            num_local_experts: how many of the experts this process holds; all if None.
        """
        nn.Module.__init__(self)  # not super(): the subclass has a second base whose constructor takes other arguments
        self.config, self.routing = config, config.routing
        routing = config.routing
        self.num_experts = config.num_experts
        self.kind = routing.kind
        self.capacity = routing.capacity
        self.tokens_per_image = config.tokens_per_image
        self._allocate_router(width)
        mlp, hidden = config.expert_mlp, config.expert_hidden
        self.experts = Experts(mlp, num_local_experts or self.num_experts, width, hidden)
        self.shared_experts = FFN[mlp](width, config.shared_hidden) if config.shared_hidden else None
        self.unconditional_expert = FFN[mlp](width, hidden) if routing.unconditional_expert else None
        self.capacity_predictor = None
        if config.has_capacity_predictor:
            self.capacity_predictor = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self.num_experts)
            )
            self.register_buffer("expert_threshold", torch.empty(self.num_experts, dtype=torch.float32))
        self.logit_threshold_E: Tensor | None = None
        """fp32, in place of `expert_threshold` in inference if set: thresholds of the logits, which are representable
        even where the probability is 1 in fp32."""
        self._warm_start = WarmStart()
        self.inference = "static"
        self.pool: Pool = LocalPool()
        self.pool_images = routing.pool_images
        self.part_of_pool: Pool | None = None
        """The ranks that share one pool of `pool_images`, if more than one; set for training."""
        self.dispatcher: Dispatcher[Any] = LocalDispatcher()
        self.padded_dispatcher: Dispatcher[Any] | None = None
        """Replaces `dispatcher` in training where the rule does not fix the numbers of rows."""
        if routing.padded_dispatch is not None:
            self.padded_dispatcher = PaddedDispatcher(routing.capacity, routing.padded_dispatch)
        self.bounded_dispatcher: Dispatcher[Any] | None = None
        """Likewise, in inference; see `bounded_dispatch`."""
        self.is_exact = False
        """Whether to use neither the padded dispatcher nor an unverified selection; see `exact_dispatch`."""

    def _allocate_router(self, width: int) -> None:
        """Allocate the weights and buffers of the router."""
        routing, model = self.config.routing, self.config.model
        read = width if routing.router_input == "modulated" else 2 * width
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, read))
        has_hidden = routing.affinity == "mlp"
        self.gate_hidden = nn.Linear(read, read) if has_hidden else None
        self.gate_bias = nn.Parameter(torch.empty(self.num_experts)) if has_hidden else None
        values = model.patch_size**2 * model.in_channels
        self.target_head = nn.Linear(read, values) if routing.per_layer_weight else None
        if routing.bias_rate is not None:
            self.register_buffer("correction_bias", torch.empty(self.num_experts, dtype=torch.float32))
        if self.kind == "expert_race":
            self.register_buffer("race_threshold", torch.empty(1, dtype=torch.float32))

    def forward(
        self, x_BSD: Tensor, read_BSR: Tensor | None = None, null: NullImages | None = None
    ) -> tuple[Tensor, Routing]:
        """Route the tokens of a batch through their experts.

        Args:
            x_BSD: tokens, in the dtype of the weights.
            read_BSR: what the router reads; the tokens if None.
            null: the null images, with ``routing.unconditional_expert``.

        Returns:
            [B, S, D], and the routing.
        """
        tokens_TD = x_BSD.flatten(0, 1)
        scored = self._score(tokens_TD if read_BSR is None else read_BSR.flatten(0, 1))
        rule = "static" if self.training else self.inference
        logits_TE = None if rule == "static" else self._predict(tokens_TD)
        with torch.no_grad():
            selection, race_score = remember(lambda: self._select(rule, scored.scores_TE, logits_TE, null))
        mask_TE = selection.mask_TE
        dispatcher, counts = remember(lambda: self._count(selection, tokens_TD))
        weights_TE = output_weights(scored.scores_TE, mask_TE, self._renormalizes, self.routing.weight_scale)
        plan = counts.plan(mask_TE, weights_TE)
        finish_dispatch = dispatcher.start_dispatch(gather_rows(tokens_TD, plan), counts)
        # computed while the rows travel
        shared_TD = None if self.shared_experts is None else self.shared_experts(tokens_TD)
        auxiliary, target_TP = {}, None
        if self.training:
            logits_TE = self._predict(tokens_TD)
            target_TP = None if self.target_head is None else self.target_head(scored.tokens_TR)
            auxiliary = auxiliary_losses(self.config, scored, mask_TE, self.pool, null)
        rows_RD = self.experts(finish_dispatch(), counts.of_local_experts)
        out_TD = combine_rows(dispatcher.combine(rows_RD, counts), plan)
        out_TD = out_TD if shared_TD is None else out_TD + shared_TD
        if null is not None and self.unconditional_expert is not None:
            out_TD = null.add(out_TD, self.unconditional_expert(null.only(tokens_TD)))
        must_redo = self._must_redo(counts)
        routing = Routing(mask_TE, logits_TE, weights_TE.detach(), auxiliary, target_TP, race_score, must_redo)
        return out_TD.view(x_BSD.shape), routing

    def _score(self, read_TR: Tensor) -> Scored:
        """Return the scores of what the router reads."""
        if self.gate_hidden is not None:
            read_TR = F.gelu(self.gate_hidden(read_TR))
        return score_tokens(self.routing.affinity, self.routing.score, read_TR, self.gate_weight, self.gate_bias)

    @property
    def _renormalizes(self) -> bool:
        """Whether weights are divided by their sum, which for a single expert would be the weight itself."""
        return self.routing.renormalize and not (self.kind == "token_choice" and self.capacity == 1)

    @property
    def _is_padded(self) -> bool:
        """Whether sizes may be assumed and verified later."""
        return self.padded_dispatcher is not None and self.training and not self.is_exact

    def _count(self, selection: Selection, tokens_TD: Tensor) -> tuple[Dispatcher[Any], Counts]:
        """Choose how to dispatch a selection, and return its counts."""
        dispatcher = self.dispatcher
        if selection.rows_per_expert is None:
            padded = self.padded_dispatcher if self._is_padded else self.bounded_dispatcher
            dispatcher = dispatcher if padded is None else padded
        return dispatcher, dispatcher.count(selection, self.experts.groups_ragged_rows(tokens_TD))

    def _must_redo(self, counts: Counts) -> Tensor | None:
        if counts.overflow is None or self._warm_start.inconclusive is None:
            return counts.overflow
        return counts.overflow | self._warm_start.inconclusive

    def _predict(self, tokens_TD: Tensor) -> Tensor | None:
        """Return the capacity predictor's logits, fp32 [T, E]; None without a predictor."""
        if self.capacity_predictor is None:
            return None
        last = self.capacity_predictor[-1]
        assert isinstance(last, nn.Linear)
        return fp32_linear(self.capacity_predictor[:-1](tokens_TD.detach()), last.weight, last.bias)

    def _assign(self, logits_TE: Tensor) -> Tensor:
        """Return bool [T, E]: the tokens that the capacity predictor assigns to each expert."""
        if self.logit_threshold_E is not None:
            return logits_TE > self.logit_threshold_E
        return predicted_mask(logits_TE, self.expert_threshold)

    def _select(
        self, rule: str, scores_TE: Tensor, logits_TE: Tensor | None, null: NullImages | None
    ) -> tuple[Selection, Tensor | None]:
        """Select tokens by the training rule (``static``) or by an inference rule.

        Returns:
            The selection, and `Routing.race_score`.
        """
        self._warm_start.verify_later = self._is_padded
        if self.kind == "expert_race":
            return self._race(rule, scores_TE)
        return self._select_tokens(rule, scores_TE, logits_TE, null), None

    def _race(self, rule: str, scores_TE: Tensor) -> tuple[Selection, Tensor | None]:
        """Select pairs of a token and an expert."""
        if rule == "per_token":
            return Selection(scores_TE >= self.race_threshold), None
        k = expert_race_static(len(scores_TE), self.capacity, self.pool)
        pairs = select_top_k(scores_TE.reshape(-1, 1), k, self.pool, self._warm_start)
        assert pairs.kth_E is not None
        return Selection(pairs.mask_TE.view_as(scores_TE)), pairs.kth_E[0]

    def _select_tokens(
        self, rule: str, scores_TE: Tensor, logits_TE: Tensor | None, null: NullImages | None
    ) -> Selection:
        """Select the tokens of each expert, or the experts of each token."""
        if self.kind == "token_choice":
            mask_TE = self._choose_experts(scores_TE)
            return Selection(mask_TE if null is None else null.exclude(mask_TE))
        if null is not None:
            return self._select_of_others(scores_TE, null)
        images = len(scores_TE) // self.tokens_per_image
        if rule == "static":
            images_of_pool = self.pool_images if self.training else None
            if self.kind == "expert_choice" or (images_of_pool is not None and images_of_pool < images):
                return self._select_in_parts(scores_TE, images // (images_of_pool or 1))
            pool = self.pool if images_of_pool is None else self.part_of_pool or LocalPool()
            k = batch_pool_static(len(scores_TE), self.num_experts, self.capacity, pool)
            return select_top_k(scores_TE, k, pool, self._warm_start)
        assert logits_TE is not None, "`DiT.set_inference` allows these rules only with a capacity predictor"
        predicted_TE = self._assign(logits_TE)
        if rule == "per_token":
            return Selection(predicted_TE)
        if self.kind == "batch_pool":
            k_E = batch_pool_dynamic(predicted_TE, self.pool)
            return select_top_k(scores_TE, k_E, self.pool, self._warm_start)
        k_BE = expert_choice_dynamic(predicted_TE, images)
        return Selection(expert_choice(scores_TE, k_BE))

    def _choose_experts(self, scores_TE: Tensor) -> Tensor:
        """Return bool [T, E]: the experts that each token chooses."""
        if self.routing.bias_rate is not None:
            scores_TE = scores_TE + self.correction_bias
        return token_choice(scores_TE, int(self.capacity), self.routing.groups, self.routing.used_groups)

    def _select_of_others(self, scores_TE: Tensor, null: NullImages) -> Selection:
        """Apply the training rule of ``expert_choice`` to the images that are not null. Their number varies by rank."""
        k = expert_choice_static(self.tokens_per_image, self.num_experts, self.capacity)
        k_B1 = torch.where(null.is_null_B, 0, k)[:, None]
        return Selection(expert_choice(scores_TE, k_B1))

    def _select_in_parts(self, scores_TE: Tensor, parts: int) -> Selection:
        """Apply the training rule to each of ``parts`` equal parts of this rank's tokens."""
        k = expert_choice_static(len(scores_TE) // parts, self.num_experts, self.capacity)
        k_PE = torch.full((parts, self.num_experts), k, device=scores_TE.device)
        return Selection(expert_choice(scores_TE, k_PE), rows_per_expert=k * parts)

    def forget_last_search(self) -> None:
        """Search exactly the next time, wherever the last search ended."""
        self._warm_start.forget()


@contextmanager
def exact_dispatch(layers: Iterable[MoELayer]) -> Iterator[None]:
    """Use exact selections and counts in the forward passes within the context, which then synchronize."""
    layers = list(layers)
    for layer in layers:
        layer.is_exact = True
        layer.forget_last_search()
    try:
        yield
    finally:
        for layer in layers:
            layer.is_exact = False


@contextmanager
def bounded_dispatch(layers: Iterable[MoELayer], capacities: float) -> Iterator[bool]:
    """Within the context, assume a bound on the number of rows instead of waiting for the device, where supported.

    That is where every process computes alone and experts compute ragged rows as grouped products.

    Args:
        layers: of a model in eval mode.
        capacities: the bound, as a multiple of the capacity.

    Yields:
        Whether the bound is used: `Routing.must_redo` then says whether a layer had more rows.
    """
    layers = list(layers)
    is_used = bool(layers) and all(
        isinstance(layer.dispatcher, LocalDispatcher)
        and layer.pool.size == 1  # otherwise a rank that repeats its pass would wait for the others
        and layer.experts.groups_ragged_rows(layer.gate_weight)
        for layer in layers
    )
    if is_used:
        for layer in layers:
            layer.bounded_dispatcher = BoundedDispatcher(layer.capacity * capacities)
    try:
        yield is_used
    finally:
        for layer in layers:
            layer.bounded_dispatcher = None
