"""Load the text encoders that a dataset was prepared with or a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.text_features import TextFormat, difference


def matching_encoders(
    text: TextFormat, device: torch.device, paths: Sequence[str] = (), what: str = "the text encoder"
) -> TextEncoders:
    """Load text encoders and check that they match a format.

    Args:
        text: the format.
        device: where they run.
        paths: folder or hub ID of each; if empty, those in the format.
        what: their name in messages.

    Raises:
        ConfigError: one cannot be loaded, or differs from that of the format.
    """
    names = list(paths) or [encoder.name for encoder in text.encoders]
    known = [encoder.tokens for encoder in text.encoders]
    found = TextEncoders(names, device, each=known if len(names) == len(known) else ())
    different = difference(found.format, text)
    if different is not None:
        raise ConfigError(f"{what} must be the one used in training: {different}.")
    return found
