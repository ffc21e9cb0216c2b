"""Load the text encoders that a dataset or a model was made with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.text_features import TextFormat, difference


def matching_encoders(
    text: TextFormat, device: torch.device, paths: Sequence[str] = (), what: str = "the text encoder"
) -> TextEncoders:
    """Load text encoders, and check that they are those of a format.

    Args:
        text: the format.
        device: where they run.
        paths: where they are, one for each; if empty, where the format says.
        what: their name in messages.

    Raises:
        ConfigError: one cannot be loaded, or is another encoder than that of the format.
    """
    names = list(paths) or [encoder.name for encoder in text.encoders]
    known = [encoder.tokens for encoder in text.encoders]
    found = TextEncoders(names, device, each=known if len(names) == len(known) else ())
    different = difference(found.format, text)
    if different is not None:
        raise ConfigError(f"{what} must be that of the training: {different}.")
    return found
