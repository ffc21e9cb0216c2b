"""Captions of a small dataset, encoded at startup and kept in memory (`data.text_encoder`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from diffmoe_ds.data.captions import Captions
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.data.sources.image_features import FeatureFormat
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.shards import Sample
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import DataError
from diffmoe_ds.text_features import EncoderFeatures, TextFormat, padded_row

MAX_BYTES = 4 << 30
"""Most bytes of the features of all captions, in each process."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context, compute in one thread: launchers set their number differently, and it changes rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def load_encoders(paths: tuple[str, ...]) -> TextEncoders:
    """Load text encoders once per process, for training and evaluation; on the CPU, so that all hosts get the same.

    Raises:
        ConfigError: one cannot be loaded.
    """
    return TextEncoders(paths, torch.device("cpu"))


def release_encoders() -> None:
    """Free the memory of loaded encoders, which are not needed once all captions are encoded."""
    load_encoders.cache_clear()


class EncodedCaptions:
    """The images of a dataset, with text features of their captions; implements `reader.Dataset`."""

    @one_thread()
    def __init__(self, images: Dataset, captions: Captions, encoders: TextEncoders) -> None:
        """Encode all captions; each distinct one alone, so that its features depend on nothing else.

        Args:
            images: the dataset.
            captions: the captions of its images.
            encoders: the text encoders.

        Raises:
            DataError: an image has no caption, or the features need more than `MAX_BYTES`.
        """
        self._images = images
        self.text: TextFormat | None = encoders.format
        self._layout = encoders.format.layout
        self._features: list[tuple[EncoderFeatures, ...]] = []
        numbers: dict[str, int] = {}
        chosen, counts, size = [], [], 0
        for index in range(len(images)):
            texts = captions.captions(index)
            counts.append(len(texts))
            for text in texts:
                if text not in numbers:
                    numbers[text] = len(numbers)
                    features = encoders.encode([text])[0].features
                    self._features.append(features)
                    size += sum(array.nbytes for each in features for array in each)
                chosen.append(numbers[text])
            if size > MAX_BYTES:
                raise DataError(
                    f"the text features of {len(numbers):,} captions take more than {MAX_BYTES / 2**30:g} GiB of "
                    "memory; encode them with `diffmoe prepare text` instead of data.text_encoder"
                )
        self._chosen = np.array(chosen, np.int64)
        self._counts = np.array(counts, np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._texts = list(numbers)
        self.truncated = sum(encoders.too_long(text) is not None for text in self._texts)
        """Number of distinct captions that have more tokens than an encoder reads."""

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        return self._images[index]

    @property
    def labels(self) -> np.ndarray:
        """See `Dataset`."""
        return self._images.labels

    @property
    def classes(self) -> list[str] | None:
        """See `Dataset`."""
        return self._images.classes

    @property
    def shard_sizes(self) -> Sequence[int]:
        """See `Dataset`."""
        return self._images.shard_sizes

    @property
    def latents(self) -> LatentFormat | None:
        """See `Dataset`."""
        return self._images.latents

    @property
    def features(self) -> FeatureFormat | None:
        """See `Dataset`."""
        return self._images.features

    def captions(self, index: int) -> list[str]:
        """See `Dataset`."""
        first = int(self._starts[index])
        return [self._texts[number] for number in self._chosen[first : first + int(self._counts[index])].tolist()]

    def read_moments(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """See `Dataset`."""
        return self._images.read_moments(indices, mirrored)

    def read_features(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """See `Dataset`."""
        return self._images.read_features(indices, mirrored)

    def text_rows(self, indices: Sequence[int], choices: Sequence[float]) -> np.ndarray:
        """Return the text features of one caption of each image: fp16 [B, N], see `ShardDataset.text_rows`."""
        chosen = [int(choice * self._counts[index]) for index, choice in zip(indices, choices, strict=True)]
        numbers = self._chosen[self._starts[list(indices)] + chosen]
        return np.stack([padded_row(self._layout, self._features[number]) for number in numbers.tolist()])

    def describe(self, index: int) -> str:
        """See `Dataset`."""
        return self._images.describe(index)

    def prefetch(self, shards: Iterable[int]) -> None:
        """See `Dataset`."""
        self._images.prefetch(shards)
