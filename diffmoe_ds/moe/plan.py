"""The routing plan, and the interface of the dispatchers that execute it.

Legend: T tokens of this rank, E experts, R routed rows, one for each pair of a token and an expert that takes it,
D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class RoutePlan(NamedTuple):
    """Token, expert and weight of each routed row; rows are sorted by expert, then by token."""

    token_R: Tensor
    """int64: the token of each row."""
    weight_R: Tensor
    """fp32: the score by which the expert's output is multiplied; carries the router's gradient."""
    tokens_per_expert_E: Tensor
    """int64: rows of each expert; they add up to R."""


def make_plan(mask_TE: Tensor, scores_TE: Tensor) -> RoutePlan:
    """Build the plan of a selection.

    Args:
        mask_TE: bool, expert e takes token t.
        scores_TE: fp32 router scores.
    """
    expert_R, token_R = mask_TE.T.nonzero(as_tuple=True)
    return RoutePlan(token_R, scores_TE[token_R, expert_R], mask_TE.sum(0))


class Dispatcher(Protocol):
    """Moves rows to the ranks that hold their experts, and back."""

    def dispatch(self, rows_RD: Tensor, tokens_per_expert_E: Tensor) -> tuple[Tensor, list[int], Any]:
        """Send rows to their experts.

        Args:
            rows_RD: rows sorted by global expert.
            tokens_per_expert_E: int64, rows of each global expert.

        Returns:
            The rows for the local experts, sorted by expert; the number of rows of each local expert; and the state
            that `combine` needs.
        """
        ...

    def combine(self, rows_RD: Tensor, state: Any) -> Tensor:
        """Send the experts' outputs back.

        Args:
            rows_RD: one output for each row that `dispatch` returned, in the same order.
            state: from `dispatch`.

        Returns:
            The outputs in the order of the rows passed to `dispatch`.
        """
        ...


class LocalDispatcher:
    """The `Dispatcher` of a process that holds all experts, without communication."""

    def dispatch(self, rows_RD: Tensor, tokens_per_expert_E: Tensor) -> tuple[Tensor, list[int], None]:
        """Return the rows unchanged."""
        return rows_RD, tokens_per_expert_E.tolist(), None

    def combine(self, rows_RD: Tensor, state: None) -> Tensor:
        """Return the rows unchanged."""
        return rows_RD
