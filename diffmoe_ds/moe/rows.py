"""Gather the rows of tokens, and combine the outputs of a token's rows, without atomics in either direction.

The gradient of a gather and the combination of rows are sums over the rows of each token. `index_add` computes them in
an order that varies on a GPU, and slowly on a CPU. Here each token adds its own rows, in the order of the experts: the
result is the same on every run, and no copy of the rows in fp32 is kept for the backward pass.

Legend: T tokens, R routed rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.plan import RoutePlan

CPU_ROWS = 512
"""Rows that a CPU computes at a time where it needs them in fp32, so that the copies stay in the cache."""


def gather_rows(tokens_TD: Tensor, plan: RoutePlan) -> Tensor:
    """Return the token of each routed row.

    Args:
        tokens_TD: tokens of this rank.
        plan: which of them are routed.

    Returns:
        [R, D], rows sorted by expert.
    """
    rows_RD: Tensor = _Gather.apply(tokens_TD, plan.token_R, plan.row_R, plan.start_T)  # type: ignore[no-untyped-call]
    return rows_RD


def combine_rows(rows_RD: Tensor, plan: RoutePlan) -> Tensor:
    """Return for each token the weighted sum of its rows; zero for a token that no expert took.

    Args:
        rows_RD: the experts' outputs, sorted by expert.
        plan: the tokens and weights of the rows.

    Returns:
        [T, D] in the dtype of the rows, added up in fp32.
    """
    arguments = (rows_RD, plan.weight_R, plan.token_R, plan.row_R, plan.start_T, plan.num_tokens)
    tokens_TD: Tensor = _Combine.apply(*arguments)  # type: ignore[no-untyped-call]
    return tokens_TD


def _sum_by_token(
    rows_RD: Tensor, row_R: Tensor, start_T: Tensor, num_tokens: int, weight_R: Tensor | None = None
) -> Tensor:
    """Add up the rows ``row_R[start_T[t] : start_T[t + 1]]`` of each token t, in fp32."""
    summed = F.embedding_bag(
        row_R, rows_RD.float(), start_T, mode="sum", per_sample_weights=weight_R, include_last_offset=True
    )
    return summed[:num_tokens].to(rows_RD.dtype)  # without the sums of unused rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, token_R: Tensor, row_R: Tensor, start_T: Tensor) -> Tensor:
        ctx.save_for_backward(row_R, start_T)
        ctx.num_tokens = len(tokens_TD)
        return tokens_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        row_R, start_T = ctx.saved_tensors
        return _sum_by_token(gradient_RD, row_R, start_T, ctx.num_tokens), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weight_R: Tensor, token_R: Tensor, row_R: Tensor, start_T: Tensor, num_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, weight_R, token_R)
        return _sum_by_token(rows_RD, row_R, start_T, num_tokens, weight_R.index_select(0, row_R))

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows_RD, weight_R, token_R = ctx.saved_tensors
        gradient_RD, weight_gradient_R = torch.empty_like(rows_RD), torch.empty_like(weight_R)
        tensors = (gradient_RD, weight_gradient_R, rows_RD, weight_R, token_R)
        size = CPU_ROWS if rows_RD.device.type == "cpu" else max(1, len(rows_RD))
        for out, weight_out, rows, weight, token in zip(*(t.split(size) for t in tensors), strict=True):
            gradient = gradient_TD.index_select(0, token).float()
            torch.sum(gradient * rows.float(), dim=1, out=weight_out)
            out.copy_(gradient.mul_(weight[:, None]))
        return gradient_RD, weight_gradient_R, None, None, None, None
