"""The experts of one layer that this process holds, as stacked weights.

Legend: E experts held here, R rows sorted by expert, K rows of each expert if all have as many, D width,
H hidden width.  The names and shapes of the weights are DeepSpeed's for grouped experts: ``w1 [E, H, D]``,
``w2 [E, D, H]`` and ``w3``, which is SwiGLU's second input matrix ``[E, H, D]`` or, for GELU experts, both
biases side by side ``[E, 1, H + D]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """FFNs of the same shape; every row goes through the one of its expert."""

    def __init__(self, kind: str, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        self.hidden = hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        third = (num_experts, hidden, width) if kind == "swiglu" else (num_experts, 1, hidden + width)
        self.w3 = nn.Parameter(torch.empty(third))

    def forward(self, rows_RD: Tensor, rows_E: list[int], even: bool) -> Tensor:
        """Each row through its expert.

        Args:
            rows_RD: rows sorted by expert, in the type of the weights.
            rows_E: how many rows each expert has; zeros are fine.
            even: all have as many.  In training this must be known from the routing rule, not from ``rows_E``: the two
                ways of computing finish their gradients in different orders, and DeepSpeed's buckets hold gradients in
                the order in which they come, which must be the same on all ranks.

        Returns:
            [R, D].
        """
        assert not even or len(set(rows_E)) == 1, rows_E
        if even:  # a dense batch: nothing to pad, nothing to loop over
            x = rows_RD.unflatten(0, (len(rows_E), rows_E[0]))
            return self._ffn(x, self.w1, self.w2, self.w3).flatten(0, 1)
        # unbind, not w[e]: the gradient of a slice would be as large as all experts
        weights = zip(self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        parts = [self._ffn(x, *w) for x, w in zip(rows_RD.split(rows_E), weights, strict=True)]
        return torch.cat(parts)

    def _ffn(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """x [..., K, D] through weights with or without a leading expert dimension."""
        if self.kind == "swiglu":
            return (F.silu(x @ w1.mT) * (x @ w3.mT)) @ w2.mT
        bias1, bias2 = w3.split([self.hidden, w2.shape[-2]], dim=-1)
        hidden = F.gelu(_affine(x, w1, bias1), approximate="tanh")
        return _affine(hidden, w2, bias2)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.dim() == 3:
        return torch.baddbmm(bias, x, weight.mT)
    return F.linear(x, weight, bias[0])
