"""The local experts of one layer, as stacked weights.

Legend: E experts held here, R rows sorted by expert, K rows of each expert if all have the same number, D width,
H hidden width. Names and shapes of the weights are DeepSpeed's for grouped experts: ``w1 [E, H, D]``, ``w2 [E, D, H]``
and ``w3``, which is SwiGLU's second input matrix ``[E, H, D]`` or, for GELU experts, both biases
concatenated, ``[E, 1, H + D]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """FFNs of the same shape; every row goes through the FFN of its expert."""

    def __init__(self, kind: str, num_experts: int, width: int, hidden: int) -> None:
        """Allocate the weights.

        Args:
            kind: ``gelu`` or ``swiglu``.
            num_experts: experts held here.
            width: D.
            hidden: H.
        """
        super().__init__()
        self.kind = kind
        self.hidden = hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        third = (num_experts, hidden, width) if kind == "swiglu" else (num_experts, 1, hidden + width)
        self.w3 = nn.Parameter(torch.empty(third))

    def forward(self, rows_RD: Tensor, tokens_per_expert: list[int], equal_counts: bool) -> Tensor:
        """Compute each row with its expert.

        Args:
            rows_RD: rows sorted by expert, in the dtype of the weights.
            tokens_per_expert: rows of each expert; may be 0.
            equal_counts: all experts have the same number of rows. In training this must follow from the routing rule,
                not from the counts: the two code paths compute their gradients in different orders, and DeepSpeed fills
                its buckets in the order in which gradients are ready, which must be the same on all ranks.

        Returns:
            [R, D].
        """
        assert not equal_counts or len(set(tokens_per_expert)) == 1, tokens_per_expert
        if equal_counts:  # one batched matmul, without padding or a loop
            x_EKD = rows_RD.view(len(tokens_per_expert), tokens_per_expert[0], rows_RD.shape[1])
            return self._ffn(x_EKD, self.w1, self.w2, self.w3).flatten(0, 1)
        # unbind, not w[e]: autograd would allocate a gradient of all experts for each slice
        weights = zip(self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        parts = [self._ffn(x, *w) for x, w in zip(rows_RD.split(tokens_per_expert), weights, strict=True)]
        return torch.cat(parts)

    def _ffn(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """Apply an FFN to x [..., K, D]; the weights may have a leading expert dimension."""
        if self.kind == "swiglu":
            return (F.silu(x @ w1.mT) * (x @ w3.mT)) @ w2.mT
        bias1, bias2 = w3.split([self.hidden, w2.shape[-2]], dim=-1)
        hidden = F.gelu(_affine(x, w1, bias1), approximate="tanh")
        return _affine(hidden, w2, bias2)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.dim() == 3:
        return torch.baddbmm(bias, x, weight.mT)
    return F.linear(x, weight, bias[0])
