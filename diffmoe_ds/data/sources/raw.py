"""Raw images as a data set: cropped to the model's size, or to what its VAE makes of it, when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.images import centre_crop, open_rgb
from diffmoe_ds.data.sources.shards import Sample
from diffmoe_ds.errors import DataError

IMAGES_TOGETHER = 1000
"""Files of a folder have no shards; for shuffling in windows, so many in a row stand for one."""


class RawImages:
    """The images of a source as uint8 ``[3, size, size]``; for what it is to the loader see ``reader.Dataset``.

    ``ds[i]`` raises ``DataError`` for an image that cannot be read: training does not leave images out.
    """

    latents = None

    def __init__(self, source: Source, size: int):
        self._source = source
        self._size = size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        data = self._source.image_bytes(index)
        try:
            image = centre_crop(open_rgb(data), self._size)
        except Exception as error:  # what a decoder raises on damaged bytes depends on the bytes
            raise DataError(f"{self.describe(index)} cannot be decoded: {error}") from error
        return Sample(image, int(self.labels[index]), self._source.key(index))

    @property
    def labels(self) -> np.ndarray:
        """int64 ``[n]``."""
        return self._source.labels

    @property
    def shard_sizes(self) -> list[int]:
        """Of the source's shards, or of what stands for them."""
        sizes = getattr(self._source, "shard_sizes", None)
        if sizes is None:
            whole, rest = divmod(len(self), IMAGES_TOGETHER)
            sizes = [IMAGES_TOGETHER] * whole + [rest] * (rest > 0)
        return sizes

    def describe(self, index: int) -> str:
        """Where an image is, for messages."""
        return self._source.describe(index)

    def read_halves(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """Raw images have no stored latents."""
        raise AssertionError("only prepared latents are read by halves")

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards that are URLs."""
        if hasattr(self._source, "prefetch"):
            self._source.prefetch(shards)
