"""What routing decides, as the dispatcher needs it.

Legend: T tokens of this rank, E experts, R routed rows, one per token and expert that takes it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RoutePlan(NamedTuple):
    """Which token rows go to which expert, with which weight; rows sorted by expert, then by token."""

    token_R: Tensor
    """int64: the token of each row."""
    weight_R: Tensor
    """fp32: the score that the expert's output is multiplied by; carries the router's gradient."""
    rows_E: Tensor
    """int64: rows per expert; they add up to R."""


def make_plan(mask_TE: Tensor, scores_TE: Tensor) -> RoutePlan:
    """The plan of a selection.

    Args:
        mask_TE: bool, token t is taken by expert e.
        scores_TE: fp32 router scores.
    """
    expert_R, token_R = mask_TE.T.nonzero(as_tuple=True)
    return RoutePlan(token_R, scores_TE[token_R, expert_R], mask_TE.sum(0))
