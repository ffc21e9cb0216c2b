"""The routing plan: which token goes to which expert with which weight; and the interface of what moves the rows.

Legend: T tokens of this rank, E experts, R routed rows, one for each pair of a token and an expert that takes it,
P ranks of the EP group, L = E / P experts held by a rank, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.top_k import Selection


class RoutePlan(NamedTuple):
    """Routed rows, sorted by expert, then by token. Padded and bounded dispatch append unused rows."""

    token_R: Tensor
    """int64: the token of each row."""
    weight_R: Tensor
    """fp32: the score by which the expert's output is multiplied; carries the router's gradient."""
    row_R: Tensor
    """int64: row indices, sorted by token, then by expert."""
    start_T: Tensor
    """int64, at least T + 1: rows ``row_R[start_T[t] : start_T[t + 1]]`` are those of token t; after these, unused rows
    in parts of any size. The last element is R."""
    num_tokens: int
    """T."""


def make_plan(mask_TE: Tensor, scores_TE: Tensor, num_rows: int) -> RoutePlan:
    """Build the plan of a selection, without a host synchronization.

    Args:
        mask_TE: bool, expert e takes token t.
        scores_TE: fp32 router scores.
        num_rows: R, the number of True in the mask.
    """
    mask_ET = mask_TE.T.contiguous()
    expert_R, token_R = torch.nonzero_static(mask_ET, size=num_rows, fill_value=0).unbind(1)
    row_ET = mask_ET.flatten().cumsum(0).view(mask_ET.shape) - 1
    weight_R = scores_TE.flatten().gather(0, token_R * scores_TE.shape[1] + expert_R)
    return RoutePlan(token_R, weight_R, *rows_by_token(mask_TE, row_ET, num_rows), len(mask_TE))


def rows_by_token(mask_TE: Tensor, row_ET: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return ``row_R`` and ``start_T`` of a plan without unused rows; see `RoutePlan`.

    Args:
        mask_TE: bool, expert e takes token t.
        row_ET: int64, the row of each such pair.
        size: elements of ``row_R``; those after the last pair are that of the first token and expert.
    """
    token_R, expert_R = torch.nonzero_static(mask_TE, size=size, fill_value=0).unbind(1)
    row_R = row_ET.flatten().index_select(0, expert_R * len(mask_TE) + token_R)
    return row_R, F.pad(mask_TE.sum(1).cumsum(0), (1, 0))


SLOTS_OF_SPARE_BAG = 64
"""The most unused rows in a bag: a GPU sums up each bag serially."""


def add_spare_bags(start_T: Tensor, size: int) -> Tensor:
    """Extend ``RoutePlan.start_T`` so that unused rows are in bags of their own.

    Args:
        start_T: int64 [T + 1], at most ``size``.
        size: R, unused rows included.
    """
    end = start_T[-1]
    spare_bags = math.ceil(size / SLOTS_OF_SPARE_BAG)
    spare = torch.arange(1, spare_bags + 1, device=start_T.device)
    return torch.cat([start_T, end + (size - end) * spare // spare_bags])


class Counts(Protocol):
    """How many rows go where."""

    @property
    def of_local_experts(self) -> list[int] | Tensor:
        """Rows of each expert held here; see `expert_ffn.expert_ffn`."""
        ...

    @property
    def overflow(self) -> Tensor | None:
        """Bool scalar: rows are lost, so the pass must be repeated with exact counts; None if they never are."""
        ...

    def plan(self, mask_TE: Tensor, scores_TE: Tensor) -> RoutePlan:
        """Return the plan of the counted selection; see `make_plan`."""
        ...


class RowCounts(NamedTuple):
    """Exact numbers of rows, known to the host."""

    sent_PL: list[list[int]]
    """Rows that this rank sends to each expert of each rank."""
    received_PL: list[list[int]]
    """Rows that this rank receives from each rank for each of its experts."""

    @property
    def routed(self) -> int:
        """R, the rows that this rank routes."""
        return sum(map(sum, self.sent_PL))

    @property
    def of_local_experts(self) -> list[int]:
        """Rows of each expert held here."""
        return [sum(counts) for counts in zip(*self.received_PL, strict=True)]

    @property
    def overflow(self) -> None:
        """None: no rows are lost."""
        return None

    def plan(self, mask_TE: Tensor, scores_TE: Tensor) -> RoutePlan:
        """Return the plan of the counted selection; see `make_plan`."""
        return make_plan(mask_TE, scores_TE, self.routed)


C = TypeVar("C", bound=Counts)


class Dispatcher(Protocol[C]):
    """Moves rows to the ranks that hold their experts, and back."""

    def count(self, selection: Selection, is_grouped: bool) -> C:
        """Return how many rows go where.

        Synchronizes with the device unless the routing rule fixes these numbers, or the dispatcher assumes them.

        Args:
            selection: the tokens that experts take.
            is_grouped: whether only the device has to know the numbers of rows; see `Experts.groups_ragged_rows`.
        """
        ...

    def start_dispatch(self, rows_RD: Tensor, counts: C) -> Callable[[], Tensor]:
        """Start sending rows, sorted by global expert, to their experts.

        Returns:
            A function that waits for the rows of the experts held here, and returns them sorted by expert.
        """
        ...

    def combine(self, rows_RD: Tensor, counts: C) -> Tensor:
        """Send one output for each row that `start_dispatch` returned, in the same order, back.

        Returns:
            The outputs in the order of the rows passed to `start_dispatch`.
        """
        ...


class WithoutExchange:
    """The half of a `Dispatcher` that moves rows, for a process that holds all experts."""

    def start_dispatch(self, rows_RD: Tensor, counts: Counts) -> Callable[[], Tensor]:
        """Return the rows unchanged when called."""
        return lambda: rows_RD

    def combine(self, rows_RD: Tensor, counts: Counts) -> Tensor:
        """Return the rows unchanged."""
        return rows_RD


class LocalDispatcher(WithoutExchange):
    """The `Dispatcher` of a process that holds all experts, without communication."""

    def count(self, selection: Selection, is_grouped: bool) -> RowCounts:
        """Return the counts; see `Dispatcher`."""
        if selection.rows_per_expert is not None:
            counts = [selection.rows_per_expert] * selection.mask_TE.shape[1]
        else:
            counts = selection.mask_TE.sum(0).tolist()
        return RowCounts([counts], [counts])
