"""Preparation of image features: the tokens of a frozen network, beside the images or latents of the same crops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffmoe_ds.data.feature_network import FeatureNetwork
from diffmoe_ds.data.prepare.encoders import Encoded, LatentEncoder, PixelEncoder
from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.image_features import FEATURES_SUFFIX


class FeatureEncoder:
    """Adds features of a crop and its mirror image to what another encoder stores for the crop.

    A batch holds images of one shard only, as in `LatentEncoder`.
    """

    text = None

    def __init__(self, images: PixelEncoder | LatentEncoder, network: FeatureNetwork, batch_size: int) -> None:
        """Combine the parts.

        Args:
            images: crops and stores the images.
            network: computes the features.
            batch_size: images per batch of the network.
        """
        self.latents = images.latents
        self.features = network.format
        self._images = images
        self._network = network
        self._batch_size = batch_size

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            **self._images.settings(),
            "features": self.features.to_json(),
            "features_batch_size": self._batch_size,
            "device": self._network.device.type,
        }

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See `Encoder`."""
        images = self._images.encode(source, indices)
        while batch := list(itertools.islice(images, self._batch_size)):
            yield from self._batch(batch)

    def _batch(self, batch: list[Encoded]) -> Iterator[Encoded]:
        crops = [encoded.crop for encoded in batch if encoded.crop is not None]
        found: Iterator[np.ndarray] = iter(())
        if crops:
            both = np.stack(crops)
            mirrored = np.ascontiguousarray(both[..., ::-1])
            found = iter(np.stack([self._network.tokens(both), self._network.tokens(mirrored)], axis=1))
        for encoded in batch:
            if encoded.crop is None:
                yield encoded
                continue
            features_2TF = next(found)
            if not np.isfinite(features_2TF).all():
                yield Encoded(encoded.index, unreadable="its image features contain NaN or Inf in float16")
                continue
            more = (FEATURES_SUFFIX, self.features.encode(features_2TF))
            yield replace(encoded, crop=None, more=(*encoded.more, more))
