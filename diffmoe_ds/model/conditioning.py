"""Conditioners: modules that turn a condition into one vector per image.

A conditioner has ``forward(condition, drop_B) -> [B, D]`` and ``null_like(condition)``, which returns the null
condition. The transformer adds the vector to the time embedding and passes the sum to every block, so another kind of
condition, such as text, needs only another conditioner, not a change to the blocks.

Legend: B images, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassConditioner(nn.Module):
    """An embedding table of class labels, with an extra row for "no label" if labels are dropped in training."""

    def __init__(self, num_classes: int, width: int, has_null: bool) -> None:
        """Allocate the table.

        Args:
            num_classes: number of classes.
            width: D.
            has_null: add the row for "no label".
        """
        super().__init__()
        self.num_classes = num_classes
        # not nn.Embedding(rows, width): on the meta device, its initialization imports torch._dynamo
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + has_null, width), freeze=False)

    def forward(self, label_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Embed the labels.

        Args:
            label_B: int64 labels; ``num_classes`` is "no label".
            drop_B: bool, images whose label is replaced by "no label"; None replaces none.

        Returns:
            [B, D] in the dtype of the weights.
        """
        if drop_B is not None:
            label_B = torch.where(drop_B, self.num_classes, label_B)
        embedding_BD: Tensor = self.embedding_table(label_B)
        return embedding_BD

    def null_like(self, label_B: Tensor) -> Tensor:
        """Return a label "no label" for each image, for the unconditional half of guidance."""
        return torch.full_like(label_B, self.num_classes)
