"""All-to-all dispatch: send rows to the ranks that hold their experts, and the experts' outputs back.

Legend: P ranks of the EP group, E experts, L = E / P experts held by a rank, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.collectives import Exchange, all_to_all
from diffmoe_ds.moe.first_pass import remember
from diffmoe_ds.moe.padding import PaddedDispatcher
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
        self.pool_offset = pool_offset

    def count(self, selection: Selection, is_grouped: bool) -> RowCounts:
        """Return the counts; see `plan.Dispatcher`."""
        local_experts = selection.mask_TE.shape[1] // self.ranks
        if selection.rows_per_expert is not None:  # of every rank: they hold the same number of tokens
            counts = [[selection.rows_per_expert] * local_experts] * self.ranks
            return RowCounts(counts, counts)
        sent_PL, received_PL = _sent_and_received(selection, self.group, self.pool_offset)
        return RowCounts(*torch.stack([sent_PL, received_PL]).tolist())  # one copy to the host

    def start_dispatch(self, rows_RD: Tensor, counts: RowCounts) -> Callable[[], Tensor]:
        """Send rows to their experts; see `plan.Dispatcher`."""
        finish = start_exchange(rows_RD, _totals(counts.sent_PL), _totals(counts.received_PL), self.group)
        return lambda: _regroup(finish(), counts.received_PL)

    def combine(self, rows_RD: Tensor, counts: RowCounts) -> Tensor:
        """Send the experts' outputs back; see `plan.Dispatcher`."""
        sorted_RD = _regroup(rows_RD, [list(ranks) for ranks in zip(*counts.received_PL, strict=True)])
        return start_exchange(sorted_RD, _totals(counts.received_PL), _totals(counts.sent_PL), self.group)()


class PaddedAllToAllDispatcher(PaddedDispatcher):
    """The `PaddedDispatcher` of an EP group."""

    def __init__(self, capacity: float, slack: float, group: dist.ProcessGroup, pool_offset: int | None) -> None:
        """Set the number of slots and the group.

        Args:
            capacity: see `PaddedDispatcher`.
            slack: see `PaddedDispatcher`.
            group: the EP group.
            pool_offset: see `AllToAllDispatcher`.
        """
        super().__init__(capacity, slack)
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.pool_offset = pool_offset

    def rows_per_expert(self, selection: Selection) -> int | None:
        if self.pool_offset is None or selection.counts_WE is None or len(selection.counts_WE) != self.ranks:
            return None
        return selection.rows_per_expert_in_pool  # the pool has one replica of each expert, so all rows arrive here

    def received(self, selection: Selection) -> Tensor:
        return _sent_and_received(selection, self.group, self.pool_offset)[1]

    def start_exchange(self, rows_RD: Tensor) -> Callable[[], Tensor]:
        slots = [len(rows_RD) // self.ranks] * self.ranks
        return start_exchange(rows_RD, slots, slots, self.group)


def _sent_and_received(
    selection: Selection, group: dist.ProcessGroup, pool_offset: int | None
) -> tuple[Tensor, Tensor]:
    """Return the rows that this rank sends and receives, int64 [P, L] each; see `AllToAllDispatcher`."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if selection.counts_WE is not None and pool_offset is not None:
        counts_PPL = selection.counts_WE[pool_offset:][:ranks].view(ranks, ranks, -1)
        return counts_PPL[rank], counts_PPL[:, rank]
    sent_PL = selection.mask_TE.sum(0).view(ranks, -1)
    return sent_PL, all_to_all(sent_PL, group=group)


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


def start_exchange(
    rows_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """Start a differentiable all-to-all of rows.

    Its gradient is the reverse exchange. Autograd runs nodes in reverse order of their creation, so that exchange is
    also started before, and awaited after, the backward pass of whatever was computed between start and finish.

    Args:
        rows_RD: rows to send, ordered by destination rank.
        sent: rows sent to each rank.
        received: rows received from each rank.
        group: the ranks.

    Returns:
        A function that waits for the received rows, ordered by source rank, and returns them.
    """
    flight = _Flight(sent, received, group)
    started_RD = _Start.apply(rows_RD, flight)  # type: ignore[no-untyped-call]

    def finish() -> Tensor:
        arrived_RD: Tensor = _Finish.apply(started_RD, flight)  # type: ignore[no-untyped-call]
        return arrived_RD

    return finish


class _Flight:
    """Rows on their way in both passes of one exchange."""

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.forward: Exchange | None = None
        self.backward: Exchange | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.forward = remember(lambda: Exchange(rows_RD, flight.sent, flight.received, flight.group))
        return flight.forward.rows.detach()  # not the remembered tensor, which the second pass returns as well

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None]:
        exchange, ctx.flight.backward = ctx.flight.backward, None
        return exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started_RD: Tensor, flight: _Flight) -> Tensor:
        assert flight.forward is not None, "started before"
        ctx.flight = flight
        flight.forward.wait()
        flight.forward = None
        return started_RD.view_as(started_RD)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.backward = Exchange(gradient_RD, flight.received, flight.sent, flight.group)
        return gradient_RD, None  # has the shape that autograd expects; `_Start` replaces it
