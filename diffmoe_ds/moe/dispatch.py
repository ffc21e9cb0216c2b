"""All-to-all dispatch and combine: send rows to the ranks that hold their experts, and their outputs back.

Legend: P ranks of the EP group, E experts, L = E / P experts held by a rank, R rows, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_to_all


class DispatchState(NamedTuple):
    """State that `AllToAllDispatcher.combine` needs to send rows back."""

    sent_P: list[int]
    """Rows that this rank sent to each rank."""
    received_P: list[int]
    """Rows that this rank received from each rank."""
    order_R: Tensor | None
    """The permutation that sorted received rows by expert; None if they arrived sorted."""


class AllToAllDispatcher:
    """The `plan.Dispatcher` of an EP group. Any split works, zero rows included."""

    def __init__(self, group: dist.ProcessGroup, equal_counts: bool) -> None:
        """Set the group.

        Args:
            group: the EP group.
            equal_counts: every rank routes the same number of rows to every expert (a pool of one rank in training),
                so counts need not be exchanged.
        """
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.equal_counts = equal_counts

    def dispatch(self, rows_RD: Tensor, tokens_per_expert_E: Tensor) -> tuple[Tensor, list[int], DispatchState]:
        """Send rows to their experts; see `plan.Dispatcher`."""
        sent_PL = tokens_per_expert_E.view(self.ranks, -1)
        received_PL = sent_PL if self.equal_counts else all_to_all(sent_PL, group=self.group)
        # copy all split sizes to the host at once
        splits = torch.stack([sent_PL, received_PL]).tolist()
        sent_P, received_P = ([sum(counts) for counts in part] for part in splits)
        tokens_per_expert_L = [sum(counts) for counts in zip(*splits[1], strict=True)]
        arrived_RD = _exchange(rows_RD, sent_P, received_P, self.group)
        order_R = _expert_order(received_PL) if len(tokens_per_expert_L) > 1 else None
        if order_R is not None:
            arrived_RD = arrived_RD[order_R]
        return arrived_RD, tokens_per_expert_L, DispatchState(sent_P, received_P, order_R)

    def combine(self, rows_RD: Tensor, state: DispatchState) -> Tensor:
        """Send the experts' outputs back; see `plan.Dispatcher`."""
        if state.order_R is not None:
            rows_RD = rows_RD[state.order_R.argsort()]
        return _exchange(rows_RD, state.received_P, state.sent_P, self.group)


def _expert_order(received_PL: Tensor) -> Tensor:
    """Return the index that sorts rows by expert, then rank; they arrive sorted by rank, then expert."""
    ranks, experts = received_PL.shape
    expert_PL = torch.arange(experts, device=received_PL.device).expand(ranks, experts)
    return expert_PL.flatten().repeat_interleave(received_PL.flatten()).argsort(stable=True)


def _exchange(rows_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Exchange rows between all pairs of ranks, differentiably."""
    out_RD: Tensor = _AllToAll.apply(rows_RD, sent, received, group)  # type: ignore[no-untyped-call]
    return out_RD


class _AllToAll(torch.autograd.Function):
    """all-to-all over rows; its gradient is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(rows_RD, received, sent, group)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(gradient_RD, ctx.sent, ctx.received, ctx.group), None, None, None
