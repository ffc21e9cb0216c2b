"""Padded dispatch: a fixed number of slots per expert, so that the host need not know how many rows go where.

Every rank sends M rows to each expert: those of its tokens that the expert takes, in the order of the tokens, and after
them padding. Sizes are then known without waiting for the device. Where an expert takes more than M tokens of a rank,
rows are lost, so the pass must be repeated with exact counts: `PaddedCounts.overflow` says so, on the device.

The receiving rank moves the rows of its experts to where they would be without padding, so that an expert computes the
same rows in the same order if the number of its rows is known: where the ranks that share the experts are the pool, it
is K. If only the device knows it, one grouped product computes the rows where torch has a kernel for that; otherwise
experts compute the padding as well.

Legend: T tokens of this rank, E experts, M slots of an expert for the rows of one rank, P ranks of the EP group,
L = E / P experts held by a rank, K tokens that an expert takes from the whole pool, R slots or rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.moe.plan import RoutePlan, add_spare_bags, rows_by_token
from diffmoe_ds.moe.top_k import Selection


class PaddedCounts(NamedTuple):
    """Slots and rows of a padded dispatch. If rows are lost, only ``overflow`` is meaningful."""

    slots: int
    """M."""
    of_local_experts: list[int] | Tensor
    """Rows that each expert held here computes; see `expert_ffn.expert_ffn`."""
    slot_R: Tensor
    """int64: the received slot, in [0, P * L * M), of each of these rows, and of any after them."""
    row_R: Tensor
    """int64 [P * L * M]: the row of each received slot; any row for padding."""
    overflow: Tensor
    """bool scalar: this rank has more than M rows for an expert."""

    def plan(self, mask_TE: Tensor, scores_TE: Tensor) -> RoutePlan:
        """Return the plan whose rows are the slots of all experts."""
        return make_padded_plan(mask_TE, scores_TE, self.slots)


def slots_of_expert(tokens: int, experts: int, slots_per_token: float) -> int:
    """Return M, the slots of each expert for the rows of a rank with ``tokens`` tokens."""
    return math.ceil(min(tokens, slots_per_token * tokens / experts))


class PaddedDispatcher:
    """A `plan.Dispatcher` that never synchronizes with the device. The base class serves a process with all experts.

    All ranks must have the same number of tokens.
    """

    ranks = 1

    def __init__(self, capacity: float, slack: float) -> None:
        """Set the number of slots.

        Args:
            capacity: the average number of experts per token.
            slack: slots per expected row; at least 1.
        """
        self._slots_per_token = capacity * slack

    def count(self, selection: Selection, is_grouped: bool) -> PaddedCounts:
        """Return the counts; see `plan.Dispatcher`."""
        tokens, experts = selection.mask_TE.shape
        local_experts = experts // self.ranks
        slots = slots_of_expert(tokens, experts, self._slots_per_token)
        rows_E = selection.mask_TE.sum(0)
        computed: list[int] | Tensor
        known = self.rows_per_expert(selection)
        if known is not None:
            rows = max(1, known)  # so that padding has a valid index
            received_PL, size, computed = self.received(selection), rows * local_experts, [rows] * local_experts
        elif is_grouped:
            received_PL, size = self.received(selection).clamp(max=slots), slots * experts
            computed = received_PL.sum(0)
        else:
            received_PL, size = rows_E.new_full((self.ranks, local_experts), slots), slots * experts
            computed = [slots * self.ranks] * local_experts
        return PaddedCounts(slots, computed, *_positions(received_PL, slots, size), (rows_E > slots).any())

    def rows_per_expert(self, selection: Selection) -> int | None:
        """Return the number of rows of each expert held here, if the rule fixes it."""
        return None

    def received(self, selection: Selection) -> Tensor:
        """Return the rows that this rank receives from each rank for each of its experts, int64 [P, L]."""
        return selection.mask_TE.sum(0)[None]

    def start_dispatch(self, rows_RD: Tensor, counts: PaddedCounts) -> Callable[[], Tensor]:
        """Send slots to their experts; see `plan.Dispatcher`."""
        finish = self.start_exchange(rows_RD)
        return lambda: _take(finish(), counts.slot_R, counts.row_R)

    def combine(self, rows_RD: Tensor, counts: PaddedCounts) -> Tensor:
        """Send the experts' outputs back; see `plan.Dispatcher`."""
        return self.start_exchange(_take(rows_RD, counts.row_R, counts.slot_R))()

    def start_exchange(self, rows_RD: Tensor) -> Callable[[], Tensor]:
        """Start exchanging equally many slots with every rank of the EP group."""
        return lambda: rows_RD


def make_padded_plan(mask_TE: Tensor, scores_TE: Tensor, slots: int) -> RoutePlan:
    """Build a plan with M rows for each expert, without a host synchronization.

    A padding row holds an arbitrary token with weight 0 and is excluded from every token's sum: neither its output nor
    its gradient has an effect.

    Args:
        mask_TE: bool, expert e takes token t; rows beyond M are lost.
        scores_TE: fp32 router scores.
        slots: M.
    """
    tokens, experts = mask_TE.shape
    size = experts * slots
    mask_ET = mask_TE.T.contiguous()
    number_M = torch.arange(slots, device=mask_TE.device)
    expert_E1 = torch.arange(experts, device=mask_TE.device)[:, None]
    rows_E = mask_TE.sum(0)
    sorted_R = torch.nonzero_static(mask_ET, size=size, fill_value=0)[:, 1]
    place_EM = (rows_E.cumsum(0) - rows_E)[:, None] + number_M
    token_EM = sorted_R[place_EM.clamp(max=size - 1)]
    weight_EM = scores_TE.flatten().gather(0, (token_EM * experts + expert_E1).flatten()).view(experts, slots)
    weight_EM = weight_EM.masked_fill(number_M >= rows_E[:, None], 0)
    slot_ET = (mask_ET.cumsum(1) - 1).clamp(0, slots - 1) + expert_E1 * slots
    row_R, start_T = rows_by_token(mask_TE, slot_ET, size)
    start_T = add_spare_bags(start_T.clamp(max=size), size)
    return RoutePlan(token_EM.flatten(), weight_EM.flatten(), row_R, start_T, tokens)


def _positions(received_PL: Tensor, slots: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the slot of each row, sorted by expert, then by source rank, and the row of each slot.

    Args:
        received_PL: int64, rows from each rank for each local expert.
        slots: M.
        size: the number of rows, at least 1.
    """
    ranks, local_experts = received_PL.shape
    count_LP = received_PL.T.flatten()
    end_LP = count_LP.cumsum(0)
    first_LP = end_LP - count_LP
    place_R = torch.arange(size, device=count_LP.device)
    pair_R = torch.searchsorted(end_LP, place_R, right=True).clamp(max=len(end_LP) - 1)
    number_R = (place_R - first_LP[pair_R]).clamp(0, slots - 1)
    slot_R = ((pair_R % ranks) * local_experts + pair_R // ranks) * slots + number_R
    number_M = torch.arange(slots, device=count_LP.device)
    row_PLM = first_LP.view(local_experts, ranks).T[:, :, None] + number_M
    return slot_R, row_PLM.clamp(max=size - 1).flatten()


def _take(rows_RD: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return ``rows_RD[index]``; its gradient is a gather at ``inverse`` instead of a scatter-add."""
    taken: Tensor = _Take.apply(rows_RD, index, inverse)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows_RD.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient_RD.index_select(0, inverse), None, None
