"""Dispatch within one process that assumes at most N rows, which is checked later, so that only the device counts them.

Rows are sorted by expert and padded to N. `moe/grouped_ffn.py` skips the padding, so a generous N costs memory, not
products. If there are more than N rows, some are lost, and the pass must be repeated with exact counts:
`BoundedCounts.overflow` says so, on the device.

Legend: T tokens, E experts, N rows and padding, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.plan import RoutePlan, WithoutExchange, add_spare_bags, make_plan
from diffmoe_ds.moe.top_k import Selection


class BoundedCounts(NamedTuple):
    """Numbers of rows that only the device knows."""

    size: int
    """N."""
    of_local_experts: Tensor
    """int64 [E]: rows of each expert; their sum is at most N."""
    overflow: Tensor
    """bool scalar: there are more than N rows."""

    def plan(self, mask_TE: Tensor, scores_TE: Tensor) -> RoutePlan:
        """Return the plan whose rows end with padding."""
        return make_bounded_plan(mask_TE, scores_TE, self.size)


class BoundedDispatcher(WithoutExchange):
    """The `plan.Dispatcher` of a process that holds all experts and does not wait for the device."""

    def __init__(self, rows_per_token: float) -> None:
        """Set the bound.

        Args:
            rows_per_token: N / T; more than E has the effect of E.
        """
        self._rows_per_token = rows_per_token

    def count(self, selection: Selection, is_grouped: bool) -> BoundedCounts:
        """Return the counts; see `plan.Dispatcher`."""
        tokens, experts = selection.mask_TE.shape
        size = math.ceil(min(experts, self._rows_per_token) * tokens)
        end_E = selection.mask_TE.sum(0).cumsum(0)
        kept_E = F.pad(end_E.clamp(max=size), (1, 0)).diff()
        return BoundedCounts(size, kept_E, end_E[-1] > size)


def make_bounded_plan(mask_TE: Tensor, scores_TE: Tensor, size: int) -> RoutePlan:
    """Build a plan of at most N rows, without a host synchronization.

    A padding row holds an arbitrary token with weight 0 and is excluded from every token's sum.

    Args:
        mask_TE: bool, expert e takes token t; rows beyond N are lost.
        scores_TE: fp32 router scores.
        size: N.
    """
    plan = make_plan(mask_TE, scores_TE, size)
    is_padding_R = torch.arange(size, device=mask_TE.device) >= plan.start_T[-1]
    return plan._replace(
        weight_R=plan.weight_R.masked_fill(is_padding_R, 0),
        row_R=plan.row_R.clamp(0, size - 1),
        start_T=add_spare_bags(plan.start_T.clamp(max=size), size),
    )
