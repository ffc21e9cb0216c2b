"""The local experts of one layer, as stacked weights.

Legend: E experts held here, R rows sorted by expert, D width, H hidden width. Names and shapes of the weights are
DeepSpeed's for grouped experts: ``w1 [E, H, D]``, ``w2 [E, D, H]`` and ``w3``, which is SwiGLU's second input matrix
``[E, H, D]`` or, for GELU experts, both biases concatenated, ``[E, 1, H + D]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffmoe_ds.moe.expert_ffn import expert_ffn, groups_ragged_rows


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
        self.width, self.hidden = width, hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        third = (num_experts, hidden, width) if kind == "swiglu" else (num_experts, 1, hidden + width)
        self.w3 = nn.Parameter(torch.empty(third))

    def groups_ragged_rows(self, like: Tensor) -> bool:
        """Return whether experts with different numbers of rows are one grouped product, so that only the device has to
        know these numbers.

        Args:
            like: has the device and the dtype of the rows.
        """
        return groups_ragged_rows(like, self.width, self.hidden)

    def forward(self, rows_RD: Tensor, rows_per_expert: Sequence[int] | Tensor) -> Tensor:
        """Compute each row with its expert.

        Args:
            rows_RD: rows sorted by expert, in the dtype of the weights.
            rows_per_expert: rows of each expert; see `expert_ffn`.

        Returns:
            [R, D].
        """
        return expert_ffn(self.kind, rows_RD, self.w1, self.w2, self.w3, rows_per_expert)
