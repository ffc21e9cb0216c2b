"""Rows to the ranks that hold their experts, and back.

Legend: P ranks of the EP group, E experts, L = E / P experts held by a rank, R rows, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.collectives import WAITING


class Sent(NamedTuple):
    """What `AllToAllDispatcher.combine` needs to send rows back."""

    sent_P: list[int]
    """Rows that this rank sent to each rank."""
    received_P: list[int]
    """Rows that this rank received from each rank."""
    order_R: Tensor | None
    """How received rows were sorted by expert; none if they came sorted."""


class AllToAllDispatcher:
    """Exchange of rows within an EP group; any split works, zero rows included."""

    def __init__(self, group: dist.ProcessGroup, even: bool) -> None:
        """Bind the group.

        Args:
            group: the EP group.
            even: every rank routes the same number of rows to every expert (a pool of one rank in training), so
                nobody needs to be told how many rows will come.
        """
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.even = even

    def dispatch(self, rows_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, list[int], Any]:
        """Send rows to their experts.

        Args:
            rows_RD: rows sorted by global expert.
            rows_E: int64, rows for each global expert.

        Returns:
            The rows for this rank's experts sorted by expert, their number per local expert, and a `Sent`.
        """
        sent_PL = rows_E.unflatten(0, (self.ranks, -1))
        received_PL = sent_PL if self.even else self._exchange_counts(sent_PL)
        # one copy to the host for everything the exchange must know as numbers
        splits = torch.stack([sent_PL, received_PL]).tolist()
        sent_P, received_P = ([sum(counts) for counts in part] for part in splits)
        arrived_RD = _AllToAll.apply(rows_RD, sent_P, received_P, self.group)
        rows_L = [sum(counts) for counts in zip(*splits[1], strict=True)]
        order_R = _expert_order(received_PL) if len(rows_L) > 1 else None
        if order_R is not None:
            arrived_RD = arrived_RD[order_R]
        return arrived_RD, rows_L, Sent(sent_P, received_P, order_R)

    def combine(self, rows_RD: Tensor, sent: Sent) -> Tensor:
        """Send the experts' rows back to where they came from, in the order in which they were dispatched."""
        if sent.order_R is not None:
            rows_RD = rows_RD[sent.order_R.argsort()]
        return _AllToAll.apply(rows_RD, sent.received_P, sent.sent_P, self.group)

    def _exchange_counts(self, sent_PL: Tensor) -> Tensor:
        received_PL = torch.empty_like(sent_PL)
        with WAITING:
            dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=self.group)
        return received_PL


def _expert_order(received_PL: Tensor) -> Tensor:
    """Rows arrive by rank, then expert; this index sorts them by expert, then rank."""
    ranks, experts = received_PL.shape
    expert_PL = torch.arange(experts, device=received_PL.device).expand(ranks, experts)
    return expert_PL.flatten().repeat_interleave(received_PL.flatten()).argsort(stable=True)


class _AllToAll(torch.autograd.Function):
    """all_to_all_single over rows; its gradient is the same exchange the other way round."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows_RD.new_empty((sum(received), rows_RD.shape[1]))
        with WAITING:
            dist.all_to_all_single(out, rows_RD.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back = gradient.new_empty((sum(ctx.sent), gradient.shape[1]))
        dist.all_to_all_single(back, gradient.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return back, None, None, None
