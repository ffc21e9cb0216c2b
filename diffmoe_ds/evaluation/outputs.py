"""Common code of extractors: their outputs, and how images are converted to their input.

Legend: B images, C channels, H, W height and width, F features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Outputs(NamedTuple):
    """Outputs of an extractor for a batch, fp32 on its device."""

    features_BF: Tensor
    """The features of the Frechet distance, KID, precision and recall."""
    spatial_BS: Tensor | None = None
    """The features of sFID."""
    logits_BK: Tensor | None = None
    """The logits of the Inception Score."""


def to_rgb(images_BCHW: Tensor) -> Tensor:
    """Return uint8 images with 3 channels; a single channel is repeated."""
    assert images_BCHW.dtype == torch.uint8 and images_BCHW.shape[1] in (1, 3), describe(images_BCHW)
    return images_BCHW.expand(-1, 3, -1, -1)


def resize(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images bicubically with antialiasing to a height and width, ignoring the aspect ratio."""
    if images_BCHW.shape[-2:] == size:
        return images_BCHW
    resized = functional.interpolate(images_BCHW.float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def state_digest(network: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(tensor: Tensor) -> str:
    """Return dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, or its type if it has none."""
    text = repr(error) if isinstance(error, SystemExit) else str(error)  # that of SystemExit is a bare number
    return " ".join(text.split())[:300].rstrip(".") or type(error).__name__
