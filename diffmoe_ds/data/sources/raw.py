"""Raw images as a dataset, cropped when they are read to the size that the model or its VAE takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.images import centre_crop, open_rgb
from diffmoe_ds.data.sources.shards import Sample, ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.text import reason
from diffmoe_ds.text_features import TextFormat

IMAGES_TOGETHER = 1000
"""Images of a folder that count as one shard for shuffling in windows."""


class RawImages:
    """The images of a source as uint8 [C, size, size], C 1 or 3; implements `reader.Dataset`.

    Reading an invalid image raises `DataError`; training replaces up to ``data.max_unreadable`` of them.
    """

    latents = None
    features = None

    def __init__(self, source: Source, size: int, channels: int = 3) -> None:
        """Choose how images are converted.

        Args:
            source: the images.
            size: their height and width.
            channels: 1 converts all images to grayscale, any other number to RGB.
        """
        self._source = source
        self._size = size
        self._is_grey = channels == 1

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        data = self._source.image_bytes(index)
        try:
            picture = open_rgb(data)  # first to RGB, which composites alpha; grayscale pixels survive unchanged
            image = centre_crop(picture.convert("L") if self._is_grey else picture, self._size)
        except Exception as error:  # decoders raise many types on damaged bytes
            raise DataError(f"{self.describe(index)} cannot be decoded: {reason(error)}") from error
        return Sample(image, int(self.labels[index]), self._source.key(index))

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 [n]."""
        return self._source.labels

    @property
    def classes(self) -> list[str] | None:
        """Name of each label, if labels have names."""
        return self._source.classes

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard of the source, or of each block of `IMAGES_TOGETHER` files."""
        sizes = getattr(self._source, "shard_sizes", None)
        if sizes is None:
            whole, rest = divmod(len(self), IMAGES_TOGETHER)
            sizes = [IMAGES_TOGETHER] * whole + [rest] * (rest > 0)
        return sizes

    def describe(self, index: int) -> str:
        """Return where an image is, for messages."""
        return self._source.describe(index)

    def read_moments(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """Not supported: raw images have no stored latents."""
        raise AssertionError("raw images have no stored latents")

    def read_features(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """Not supported: raw images have no stored features."""
        raise AssertionError("raw images have no stored features")

    @property
    def text(self) -> TextFormat | None:
        """How text features are stored, if the source is shards with text features."""
        return self._source.text if isinstance(self._source, ShardDataset) else None

    def text_rows(self, indices: Sequence[int], choices: Sequence[float]) -> np.ndarray:
        """Read the text features of one caption of each image: fp16 [B, N], see `ShardDataset.text_rows`."""
        assert isinstance(self._source, ShardDataset), "image files have no stored text features"
        return self._source.text_rows(indices, choices)

    def captions(self, index: int) -> list[str]:
        """Return the captions of an image, if the source is shards; none if it has none."""
        return self._source.captions(index) if isinstance(self._source, ShardDataset) else []

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to download shards that are URLs."""
        if hasattr(self._source, "prefetch"):
            self._source.prefetch(shards)
