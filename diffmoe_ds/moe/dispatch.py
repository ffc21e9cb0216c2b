"""All-to-all dispatch: send rows to the ranks that hold their experts, and the experts' outputs back.

Legend: P ranks of the EP group, E experts, L = E / P experts held by a rank, R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_to_all
from diffmoe_ds.moe.first_pass import remember
from diffmoe_ds.moe.plan import RowCounts
from diffmoe_ds.moe.top_k import Selection


class AllToAllDispatcher:
    """The `plan.Dispatcher` of an EP group. Any split works, zero rows included."""

    def __init__(self, group: dist.ProcessGroup, pool_offset: int | None = None) -> None:
        """Set the group.

        Args:
            group: the EP group.
            pool_offset: the number, in the pool of the selection, of the EP group's first rank, if the pool contains
                the group: then the selection knows the counts of the whole group.
        """
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.pool_offset = pool_offset

    def count(self, selection: Selection) -> RowCounts:
        """Return the counts; see `plan.Dispatcher`."""
        local_experts = selection.mask_TE.shape[1] // self.ranks
        if selection.rows_per_expert is not None:  # of every rank: they hold the same number of tokens
            counts = [[selection.rows_per_expert] * local_experts] * self.ranks
            return RowCounts(counts, counts)
        if selection.counts_WE is not None and self.pool_offset is not None:
            counts_PPL = selection.counts_WE[self.pool_offset :][: self.ranks].view(self.ranks, self.ranks, -1)
            sent_PL, received_PL = counts_PPL[self.rank], counts_PPL[:, self.rank]
        else:
            sent_PL = selection.mask_TE.sum(0).view(self.ranks, -1)
            received_PL = all_to_all(sent_PL, group=self.group)
        return RowCounts(*torch.stack([sent_PL, received_PL]).tolist())  # one copy to the host

    def dispatch(self, rows_RD: Tensor, counts: RowCounts) -> Tensor:
        """Send rows to their experts; see `plan.Dispatcher`."""
        arrived_RD = self._exchange(rows_RD, _totals(counts.sent_PL), _totals(counts.received_PL))
        return _regroup(arrived_RD, counts.received_PL)

    def combine(self, rows_RD: Tensor, counts: RowCounts) -> Tensor:
        """Send the experts' outputs back; see `plan.Dispatcher`."""
        sorted_RD = _regroup(rows_RD, [list(ranks) for ranks in zip(*counts.received_PL, strict=True)])
        return self._exchange(sorted_RD, _totals(counts.received_PL), _totals(counts.sent_PL))

    def _exchange(self, rows_RD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out_RD: Tensor = _AllToAll.apply(rows_RD, sent, received, self.group)  # type: ignore[no-untyped-call]
        return out_RD


def _totals(counts_PL: list[list[int]]) -> list[int]:
    return [sum(counts) for counts in counts_PL]


def _regroup(rows_RD: Tensor, counts: list[list[int]]) -> Tensor:
    """Transpose rows that are sorted by the first index of ``counts``, then by the second."""
    if len(counts) == 1 or len(counts[0]) == 1:
        return rows_RD
    if len({count for row in counts for count in row}) == 1:
        return rows_RD.view(len(counts), len(counts[0]), -1).transpose(0, 1).reshape(rows_RD.shape)
    parts = rows_RD.split([count for row in counts for count in row])
    return torch.cat([part for j in range(len(counts[0])) for part in parts[j :: len(counts[0])]])


class _AllToAll(torch.autograd.Function):
    """all-to-all over rows; its gradient is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return remember(lambda: all_to_all(rows_RD, received, sent, group))

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(gradient_RD, ctx.sent, ctx.received, ctx.group), None, None, None
