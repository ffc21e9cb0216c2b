"""How a batch of text features is laid out: a row of fixed length for each prompt, so that a batch is one tensor.

Legend: B images, L maximum tokens, F width of the tokens, P width of the pooled vector, N values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor  # the configuration is read without torch

MAX_ENCODERS = 4
MAX_TOKENS = 1024
"""Maximum tokens of a prompt; fp16, in which a row holds the length, is exact up to 2048."""
MAX_WIDTH = 1 << 15


class TextBatch(NamedTuple):
    """The features of one encoder for a batch, as views of its rows."""

    length_B: Tensor
    """Number of tokens, in the dtype of the rows."""
    pooled_BP: Tensor
    tokens_BLF: Tensor
    """0 from the length on."""


@dataclass(frozen=True)
class EncoderShape:
    """Shape of an encoder's features."""

    tokens: int
    """Maximum tokens L of a prompt; longer ones are truncated."""
    width: int
    """Width F of a token."""
    pooled: int
    """Width P of the pooled vector."""

    @property
    def values(self) -> int:
        """Return the values of a row that belong to this encoder: length, pooled vector, tokens."""
        return 1 + self.pooled + self.tokens * self.width


@dataclass(frozen=True)
class TextLayout:
    """How a row, fp16 [N], holds the features of one prompt."""

    encoders: tuple[EncoderShape, ...]
    """In the order of the row."""

    @property
    def values(self) -> int:
        """Return N, which is even, so that rows can be stored as fp32."""
        values = sum(encoder.values for encoder in self.encoders)
        return values + values % 2

    def unpack(self, rows_BN: Tensor) -> list[TextBatch]:
        """Return the features of each encoder as views of a batch's rows."""
        parts, start = [], 0
        for encoder in self.encoders:
            length_B1, pooled_BP, tokens = rows_BN[:, start : start + encoder.values].split(
                [1, encoder.pooled, encoder.tokens * encoder.width], dim=1
            )
            parts.append(TextBatch(length_B1[:, 0], pooled_BP, tokens.unflatten(1, (encoder.tokens, encoder.width))))
            start += encoder.values
        return parts
