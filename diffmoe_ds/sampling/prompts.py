"""Prompts as the labels of a text model.

Legend: B images of a batch, N values of a row of text features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.model.conditioning import Prompts, TextConditioner
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.text_features import Caption, EncoderFeatures, TextFormat, decode_record, padded_row

CACHE_BYTES = 1 << 30
"""Features of more prompts than this are computed again whenever they are needed."""

Encode = Callable[[Sequence[str]], list[Caption]]
"""Prompts -> their features."""


class PromptSet:
    """Prompts and a negative prompt, whose features are computed when they are first needed (a `Prompts`).

    Each prompt is encoded alone, so that an image never depends on the prompts of other images. Empty prompts have
    exactly the features of the model's null condition.
    """

    def __init__(self, prompts: Sequence[str], text: TextFormat, encode: Encode, negative: str = "") -> None:
        """Keep the prompts.

        Args:
            prompts: one per label.
            text: the encoders of the model.
            encode: returns features of their shapes.
            negative: the prompt of the unconditional half of guidance.
        """
        self.prompts = tuple(prompts)
        self._layout = text.layout
        self._encode = encode
        self._negative = negative
        self._null = decode_record(text.null, text.layout).features
        self._cache: dict[str, tuple[EncoderFeatures, ...]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, labels: list[int]) -> Tensor:
        """Return the text features of some prompts; see `Prompts`."""
        prompts = [*self.prompts, self._negative]
        return torch.from_numpy(
            np.stack([padded_row(self._layout, self._features(prompts[label])) for label in labels])
        )

    def _features(self, prompt: str) -> tuple[EncoderFeatures, ...]:
        if not prompt.strip():
            return self._null
        if prompt in self._cache:
            return self._cache[prompt]
        (caption,) = self._encode([prompt])
        size = sum(array.nbytes for each in caption.features for array in each)
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[prompt] = caption.features
            self._cached_bytes += size
        return caption.features


def set_prompts(model: DiT, prompts: Prompts) -> None:
    """Set what the labels of a text model stand for."""
    assert isinstance(model.y_embedder, TextConditioner), "class models have no prompts"
    model.y_embedder.prompts = prompts
