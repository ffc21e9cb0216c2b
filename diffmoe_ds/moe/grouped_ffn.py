"""The FFNs of a layer's experts as grouped products, for rows whose numbers only the device knows.

`torch.nn.functional.grouped_mm` multiplies the rows of each expert by its weights in one kernel that reads the numbers
of rows on the device. As in `moe/expert_ffn.py`, a layer is one node of autograd's graph.

Legend: E experts held here, N rows sorted by expert and then padding, D width, H hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_ffn(
    kind: str, rows_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: Tensor, needs_backward: bool
) -> Tensor:
    """Compute each row with its expert, without reading the numbers of rows on the host.

    Args:
        kind: ``gelu`` or ``swiglu``.
        rows_ND: rows sorted by expert, then padding with any finite values, in the dtype of the weights. D and H must
            be multiples of 16 bytes.
        w1: [E, H, D].
        w2: [E, D, H].
        w3: [E, 1, H + D], both biases (gelu), or [E, H, D] (swiglu).
        counts_E: int64, the rows of each expert; their sum is at most N.
        needs_backward: whether to keep what the backward pass needs.

    Returns:
        [N, D]; zero for padding, whose gradient is zero as well.
    """
    ffn = {"gelu": _GroupedGeluFFN, "swiglu": _GroupedSwiGLUFFN}[kind]
    out_ND: Tensor = ffn.apply(rows_ND, w1, w2, w3, counts_E, needs_backward)
    return out_ND


class _Groups(NamedTuple):
    """Which rows belong to which expert."""

    end_E: Tensor
    """int32: where the rows of each expert end."""
    is_row_N1: Tensor
    """bool: not padding."""
    expert_N: Tensor
    """int64: the expert of each row; any for padding."""

    def without_padding(self, rows_NX: Tensor) -> Tensor:
        """Return the rows, with zeros in place of padding."""
        return torch.where(self.is_row_N1, rows_NX, 0)

    def multiply(self, rows_NX: Tensor, weight_EXY: Tensor, bias_EY: Tensor | None = None) -> Tensor:
        """Return the product of each row with its expert's matrix, [N, Y]; zero for padding."""
        out_NY = F.grouped_mm(rows_NX, weight_EXY, offs=self.end_E)
        if bias_EY is not None:
            out_NY = out_NY + bias_EY.index_select(0, self.expert_N)
        return self.without_padding(out_NY)  # grouped_mm does not write the rows after the last group

    def outer(self, left_NX: Tensor, right_NY: Tensor) -> Tensor:
        """Return the gradient of each expert's matrix, [E, X, Y]."""
        return F.grouped_mm(left_NX.mT, right_NY, offs=self.end_E)

    def sum(self, rows_NX: Tensor) -> Tensor:
        """Return the sum of each expert's rows, [E, X]; a row that is not finite spoils those of all experts."""
        is_of_expert_EN = torch.zeros(len(self.end_E), len(rows_NX), device=rows_NX.device, dtype=rows_NX.dtype)
        return is_of_expert_EN.scatter_(0, self.expert_N[None], 1) @ rows_NX


def _group(counts_E: Tensor, num_rows: int) -> _Groups:
    end_E = counts_E.cumsum(0).to(torch.int32)
    number_N = torch.arange(num_rows, device=counts_E.device, dtype=torch.int32)
    expert_N = torch.searchsorted(end_E, number_N, right=True).clamp(max=len(counts_E) - 1)
    return _Groups(end_E, (number_N < end_E[-1])[:, None], expert_N)


class _GroupedGeluFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: Tensor, needs_backward: bool
    ) -> Tensor:
        groups, (width, hidden) = _group(counts_E, len(x_ND)), w2.shape[1:]
        bias1, bias2 = w3.squeeze(1).split([hidden, width], dim=1)
        h_NH = groups.multiply(x_ND, w1.mT, bias1)
        value_NH = F.gelu(h_NH, approximate="tanh")
        if needs_backward:
            ctx.save_for_backward(*groups, x_ND, h_NH, value_NH, w1, w2)
        del h_NH  # before the next product allocates
        return groups.multiply(value_NH, w2.mT, bias2)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        *grouping, x_ND, h_NH, value_NH, w1, w2 = ctx.saved_tensors
        groups = _Groups(*grouping)
        dy_ND = groups.without_padding(gradient_ND)
        dh_NH = torch.ops.aten.gelu_backward(groups.multiply(dy_ND, w2), h_NH, approximate="tanh")
        dw3 = torch.cat([groups.sum(dh_NH), groups.sum(dy_ND)], dim=1)[:, None]
        return groups.multiply(dh_NH, w1), groups.outer(dh_NH, x_ND), groups.outer(dy_ND, value_NH), dw3, None, None


class _GroupedSwiGLUFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: Tensor, needs_backward: bool
    ) -> Tensor:
        groups = _group(counts_E, len(x_ND))
        gate_NH, up_NH = groups.multiply(x_ND, w1.mT), groups.multiply(x_ND, w3.mT)
        if needs_backward:
            ctx.save_for_backward(*groups, x_ND, gate_NH, up_NH, w1, w2, w3)
        value_NH = F.silu(gate_NH).mul_(up_NH)
        del gate_NH, up_NH  # before the next product allocates
        return groups.multiply(value_NH, w2.mT)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        *grouping, x_ND, gate_NH, up_NH, w1, w2, w3 = ctx.saved_tensors
        groups = _Groups(*grouping)
        dy_ND = groups.without_padding(gradient_ND)
        activated_NH, dh_NH = F.silu(gate_NH), groups.multiply(dy_ND, w2)
        dup_NH = activated_NH * dh_NH
        dgate_NH = torch.ops.aten.silu_backward(dh_NH * up_NH, gate_NH)
        dx_ND = groups.multiply(dgate_NH, w1) + groups.multiply(dup_NH, w3)
        dw2 = groups.outer(dy_ND, activated_NH * up_NH)
        return dx_ND, groups.outer(dgate_NH, x_ND), dw2, groups.outer(dup_NH, x_ND), None, None
