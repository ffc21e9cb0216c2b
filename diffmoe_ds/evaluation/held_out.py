"""Held-out images with fixed noise and times, so that every evaluation sees the same noisy images.

Legend: N images, B images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.dataset import image_shape
from diffmoe_ds.data.loader import MicroBatch, to_micro_batch
from diffmoe_ds.data.reader import Dataset, Reader, Task, check_labels, check_latents
from diffmoe_ds.diffusion.objective import NOISE_BINS
from diffmoe_ds.errors import DataError
from diffmoe_ds.rng import held_out_draws


class HeldOut:
    """N images of a dataset, evenly spaced in its order, which may be sorted by class.

    Their random numbers are functions of their position from 0 to N - 1 alone. Labels are never dropped, images never
    mirrored, and every noise level gets the same number of images (see `rng.held_out_draws`).
    """

    def __init__(self, dataset: Dataset, config: Config, num_images: int = 0) -> None:
        """Check that the dataset fits the model.

        Args:
            dataset: the images.
            config: of the model; with ``data.vae``, batches hold pixels and noise for the posterior.
            num_images: N; 0 and larger numbers than the dataset has use all images.

        Raises:
            DataError: the labels or latents do not fit the model. `batches` raises it for an image that cannot be read
                or does not fit.
        """
        self.dataset = dataset
        self._order = _EvenlySpaced(min(num_images or len(dataset), len(dataset)), len(dataset))
        model = config.model
        check_labels(dataset, model.num_classes)
        check_latents(dataset.latents, image_shape(config))
        shape = (model.in_channels, model.input_size, model.input_size)
        is_encoded_later = config.data.vae is not None
        self._draws = partial(
            held_out_draws, shape=shape, strata=NOISE_BINS, posterior=is_encoded_later or dataset.latents is not None
        )
        self._shapes = (image_shape(config), shape, *([shape] if is_encoded_later else []))

    def __len__(self) -> int:
        return self._order.positions

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
        """Read a rank's share of the images, in the order of the dataset.

        All ranks get the same number of batches of the same sizes. Shares are filled with rows whose `position` is N or
        more, which `validation_loss` ignores.

        Args:
            batch_size: B; the last batch may be smaller.
            rank: this rank.
            world: number of ranks.

        Raises:
            DataError: an image cannot be read or does not fit the model.
        """
        share = math.ceil(len(self) / world)
        end = (rank + 1) * share
        for first in range(rank * share, end, batch_size):
            positions = range(first, min(first + batch_size, end))
            shapes = tuple((len(positions), *shape) for shape in self._shapes)
            reader = Reader(self.dataset, self._order, self._draws, shapes, slots=None)
            item = reader[Task(0, positions)]
            if isinstance(item, DataError):
                raise item
            yield to_micro_batch(reader, 0, item)


@dataclass(frozen=True)
class _EvenlySpaced:
    """The order in which held-out images are read; implements `shuffle.Shuffle`."""

    positions: int
    images: int

    def __call__(self, position: int) -> int:
        """Return the index of the image at a position; that of the last one for positions past the end."""
        return min(position, self.positions - 1) * self.images // self.positions

    def next_shards(self, position: int) -> tuple[int, ...]:
        """Prefetch nothing: a shard behind a URL is downloaded when it is read."""
        return ()
