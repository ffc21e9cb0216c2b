"""Common code of extractors: their outputs, and how their errors are shown.

Legend: B images, F features, S spatial features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Outputs of an extractor for a batch, fp32 on its device."""

    features_BF: Tensor
    """The features of the Frechet distance, KID, precision and recall."""
    spatial_BS: Tensor | None = None
    """The features of sFID."""
    logits_BK: Tensor | None = None
    """The logits of the Inception Score."""


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, or its type if it has none."""
    text = repr(error) if isinstance(error, SystemExit) else str(error)  # that of SystemExit is a bare number
    return " ".join(text.split())[:300].rstrip(".") or type(error).__name__
