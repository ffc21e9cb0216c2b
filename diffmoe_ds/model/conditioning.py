"""Conditioners: modules that turn the condition of each image, a class label or a prompt, into what the blocks read.

The blocks know nothing of labels and prompts. They read a `Condition`: a vector, which the transformer adds to the time
embedding, and possibly a context for cross-attention. Another kind of condition needs only another conditioner.

Samplers choose images by label for both kinds: a label is a class, or the number of a prompt. `inputs` maps labels to
what `forward` takes.

Legend: B images, D width, L tokens of a context, W width of its tokens, N values of a row of text features.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.layers import Context, layer_norm
from diffmoe_ds.text_layout import TextLayout


class Condition(NamedTuple):
    """What the blocks read."""

    vector_BD: Tensor
    """Added to the time embedding."""
    context: Context | None = None
    """Read by cross-attention."""


class Conditioner(Protocol):
    """Turns conditions into a `Condition`, and labels into conditions."""

    @property
    def num_labels(self) -> int:
        """Number of labels from which images can be generated."""

    def null_like(self, label_B: Tensor) -> Tensor:
        """Return the label of the null condition for each image, for the unconditional half of guidance."""

    def inputs(self, label_B: Tensor) -> Tensor:
        """Return what `forward` takes for some labels, which may include that of the null condition."""

    def __call__(self, condition: Tensor, drop_B: Tensor | None = None) -> Condition:
        """Return what the blocks read, with the null condition where ``drop_B`` is true."""

    def is_null(self, condition: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Return bool [B]: the images with the null condition."""


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
        self.num_labels = num_classes
        # not nn.Embedding(rows, width): on the meta device, its initialization imports torch._dynamo
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + has_null, width), freeze=False)

    def forward(self, label_B: Tensor, drop_B: Tensor | None = None) -> Condition:
        """Embed the labels.

        Args:
            label_B: int64 labels; ``num_labels`` is "no label".
            drop_B: bool, images whose label is replaced by "no label"; None replaces none.

        Returns:
            Vectors in the dtype of the weights.
        """
        if drop_B is not None:
            label_B = torch.where(drop_B, self.num_labels, label_B)
        return Condition(self.embedding_table(label_B))

    def is_null(self, label_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """See `Conditioner`."""
        is_null_B = label_B == self.num_labels
        return is_null_B if drop_B is None else is_null_B | drop_B

    def null_like(self, label_B: Tensor) -> Tensor:
        """See `Conditioner`."""
        return torch.full_like(label_B, self.num_labels)

    def inputs(self, label_B: Tensor) -> Tensor:
        """See `Conditioner`."""
        return label_B


class Prompts(Protocol):
    """The prompts that labels stand for while images are generated."""

    def __len__(self) -> int: ...

    def rows(self, labels: list[int]) -> Tensor:
        """Return the text features of some prompts, fp16 [B, N] on the CPU; ``len(self)`` is the negative prompt."""


class TextConditioner(nn.Module):
    """Projects text features: the pooled vectors to one vector, the tokens of all encoders to one sequence."""

    null_row: Tensor
    """fp32 [N]: the features of the empty prompt, which is the null condition."""

    def __init__(self, layout: TextLayout, width: int) -> None:
        """Allocate the weights.

        Args:
            layout: shapes of the features.
            width: D.
        """
        super().__init__()
        self.layout = layout
        pooled = sum(encoder.pooled for encoder in layout.encoders)
        self.pooled_norms = nn.ModuleList(layer_norm(encoder.pooled) for encoder in layout.encoders)
        self.pooled_proj = nn.Sequential(nn.Linear(pooled, width), nn.SiLU(), nn.Linear(width, width))
        # the features' scale differs between encoders, and some of their channels have outliers
        self.token_norms = nn.ModuleList(layer_norm(encoder.width) for encoder in layout.encoders)
        self.token_projs = nn.ModuleList(
            nn.Linear(encoder.width, context_width(layout, width)) for encoder in layout.encoders
        )
        self.register_buffer("null_row", torch.empty(layout.values))
        self.prompts: Prompts | None = None
        """What labels stand for while images are generated."""

    @property
    def num_labels(self) -> int:
        """See `Conditioner`."""
        assert self.prompts is not None, "images are generated from prompts"
        return len(self.prompts)

    def forward(self, rows_BN: Tensor, drop_B: Tensor | None = None) -> Condition:
        """Project the features of prompts.

        Args:
            rows_BN: fp16; see `TextLayout`.
            drop_B: bool, images whose prompt is replaced by the empty one; None replaces none.

        Returns:
            Vectors and a context in the dtype of the weights.
        """
        if drop_B is not None:
            rows_BN = torch.where(drop_B[:, None], self.null_row.to(rows_BN.dtype), rows_BN)
        dtype = next(self.pooled_proj.parameters()).dtype
        pooled, tokens, valid = [], [], []
        for index, text in enumerate(self.layout.unpack(rows_BN)):
            pooled.append(self.pooled_norms[index](text.pooled_BP.to(dtype)))
            tokens.append(self.token_projs[index](self.token_norms[index](text.tokens_BLF.to(dtype))))
            position_L = torch.arange(text.tokens_BLF.shape[1], device=rows_BN.device)
            valid.append(position_L < text.length_B[:, None])  # before any cast: bf16 does not hold all lengths
        vector_BD = self.pooled_proj(torch.cat(pooled, dim=1))
        return Condition(vector_BD, Context(torch.cat(tokens, dim=1), torch.cat(valid, dim=1)))

    def is_null(self, rows_BN: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """See `Conditioner`; a caption may be empty."""
        is_null_B = (rows_BN == self.null_row.to(rows_BN.dtype)).all(dim=1)
        return is_null_B if drop_B is None else is_null_B | drop_B

    def null_like(self, label_B: Tensor) -> Tensor:
        """See `Conditioner`."""
        return torch.full_like(label_B, self.num_labels)

    def inputs(self, label_B: Tensor) -> Tensor:
        """See `Conditioner`."""
        assert self.prompts is not None, "images are generated from prompts"
        return self.prompts.rows(label_B.tolist()).to(label_B.device)


def context_width(layout: TextLayout, width: int) -> int:
    """Return the width of a context's tokens: that of the widest encoder, or that of the model if it is smaller."""
    return min(width, max(encoder.width for encoder in layout.encoders))


def make_conditioner(config: Config) -> ClassConditioner | TextConditioner:
    """Return the conditioner of a model."""
    model, width = config.model, config.size.hidden_size
    if config.is_text:
        return TextConditioner(config.text_layout, width)
    return ClassConditioner(model.num_classes, width, has_null=model.label_dropout > 0)
