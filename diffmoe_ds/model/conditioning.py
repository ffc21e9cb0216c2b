"""What an image is conditioned on, behind one interface: a module from a condition to one vector per image.

A conditioner has ``forward(condition, drop_B) -> [B, D]`` and ``null_like(condition)``, the condition that
stands for "none".  The transformer adds the vector to the time embedding and passes the sum to every block,
so another condition (text, say) is another conditioner and no change to the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassConditioner(nn.Module):
    """Class labels through an embedding table, with one more row for "no label" if labels are dropped."""

    def __init__(self, num_classes: int, width: int, has_null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + has_null, width)

    def forward(self, label_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Embed the labels.

        Args:
            label_B: int64 labels; ``num_classes`` is "no label".
            drop_B: bool, images whose label is replaced by "no label"; none drops nothing.

        Returns:
            [B, D] in the type of the weights.
        """
        if drop_B is not None:
            label_B = torch.where(drop_B, self.num_classes, label_B)
        return self.embedding_table(label_B)

    def null_like(self, label_B: Tensor) -> Tensor:
        """Labels that all say "no label", for the unconditional half of guidance."""
        return torch.full_like(label_B, self.num_classes)
