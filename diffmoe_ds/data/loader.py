"""Micro-batches by position: what a rank reads depends on where the run is, not on who reads it.

Step s of the run begins at position P0 = start + s * global_batch.  In its micro-step m, rank r of W reads the
positions P0 + (m * W + r) * B + [0, B) for micro-batches of B images.  Ranks, accumulation and workers can
change between two halves of a run, and the images, their order and their random draws stay the same.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from diffmoe_ds.data.draws import TrainingDraws
from diffmoe_ds.data.order import sample_index
from diffmoe_ds.data.shards import Sample
from diffmoe_ds.errors import DataError

PREFETCHED_PER_WORKER = 2  # micro-batches each worker may be ahead


class MicroBatch(NamedTuple):
    """B images with everything that chance decides about them, as CPU tensors."""

    x: torch.Tensor  # float32 [B, C, H, W]: images in [-1, 1], latents as stored
    label: torch.Tensor  # int64 [B]
    noise: torch.Tensor  # float32 [B, C, H, W]
    time: torch.Tensor  # float32 [B] in [0, 1)
    drop: torch.Tensor  # bool [B]: the label is dropped, for classifier-free guidance
    position: torch.Tensor  # int64 [B]


class Dataset(Protocol):
    """What the loader needs of a data set; ``shards.ShardDataset`` is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def describe(self, index: int) -> str: ...


class PositionLoader:
    """An endless iterable of one rank's micro-batches; each ``iter()`` begins again at ``start_position``.

    ``image_shape`` is the model's (C, H, W): smaller images are padded centrally with black, latents must fit
    exactly.  ``draws`` maps a position to its ``TrainingDraws``, with noise of ``image_shape``.  The workers live as
    long as the iterator, which is the whole run, since it has no end.

    Iterating raises ``DataError`` for a sample that cannot be read or does not fit ``image_shape`` or
    ``num_classes``.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        seed: int,
        global_batch: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        start_position: int = 0,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_workers: int = 0,
        draws: Callable[[int], TrainingDraws],
    ):
        assert global_batch == micro_batch * accumulation * world, (global_batch, micro_batch, accumulation, world)
        assert 0 <= rank < world and start_position >= 0, (rank, world, start_position)
        self._loader = torch.utils.data.DataLoader(
            _Reader(dataset, seed, image_shape, num_classes, draws),
            sampler=_Positions(start_position + rank * micro_batch, micro_batch, world * micro_batch),
            batch_size=None,  # one item of the sampler is already a micro-batch
            num_workers=num_workers,
            prefetch_factor=PREFETCHED_PER_WORKER if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else making an iterator would draw from the global generator
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        for item in self._loader:
            if isinstance(item, DataError):
                raise item
            yield item


@dataclass(frozen=True)
class _Positions:
    """The positions of one rank's micro-batches, endlessly.

    The micro-steps of a step, and the steps themselves, follow each other without a gap, so one stride does.
    """

    first: int
    micro_batch: int
    stride: int

    def __iter__(self) -> Iterator[range]:
        for first in itertools.count(self.first, self.stride):
            yield range(first, first + self.micro_batch)


@dataclass(frozen=True)
class _Reader:
    """Makes the micro-batch of a range of positions, in the main process or in a worker."""

    dataset: Dataset
    seed: int
    image_shape: tuple[int, int, int]
    num_classes: int
    draws: Callable[[int], TrainingDraws]

    def __getitem__(self, positions: range) -> MicroBatch | DataError:
        try:
            return self._micro_batch(positions)
        except DataError as error:
            return error  # raised in a worker it would come back with a traceback in its message

    def _micro_batch(self, positions: range) -> MicroBatch:
        images = np.empty((len(positions), *self.image_shape), np.float32)
        noise = np.empty_like(images)
        labels, times, drops = [], [], []
        for row, position in enumerate(positions):
            index = sample_index(self.seed, position, len(self.dataset))
            sample = self.dataset[index]
            self._check(sample, index)
            draws = self.draws(position)
            image = sample.image[:, :, ::-1] if draws.flip else sample.image
            images[row] = _model_range(image, self.image_shape)
            noise[row] = draws.noise
            labels.append(sample.label)
            times.append(draws.time)
            drops.append(draws.drop)
        return MicroBatch(
            x=torch.from_numpy(images),
            label=torch.tensor(labels, dtype=torch.int64),
            noise=torch.from_numpy(noise),
            time=torch.tensor(times, dtype=torch.float32),
            drop=torch.tensor(drops, dtype=torch.bool),
            position=torch.tensor(positions, dtype=torch.int64),
        )

    def _check(self, sample: Sample, index: int) -> None:
        image, expected = sample.image, self.image_shape
        if image.dtype == np.uint8:
            fits = image.shape[0] == expected[0] and image.shape[1] <= expected[1] and image.shape[2] <= expected[2]
        else:
            fits = image.shape == expected
        if not fits:
            rule = "at most" if image.dtype == np.uint8 else "exactly"
            raise DataError(
                f"{self.dataset.describe(index)} has an image of shape {image.shape}; "
                f"the model takes {expected[0]} channels of {rule} {expected[1]}x{expected[2]}"
            )
        if not 0 <= sample.label < self.num_classes:
            raise DataError(
                f"{self.dataset.describe(index)} has the label {sample.label}; "
                f"the model has {self.num_classes} classes, 0 to {self.num_classes - 1}"
            )


def _model_range(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """float32 of ``shape``: a uint8 image padded centrally with 0 and scaled to [-1, 1], a latent as it is."""
    if image.dtype != np.uint8:
        return image
    _, height, width = image.shape
    top, left = (shape[1] - height) // 2, (shape[2] - width) // 2
    padded = np.zeros(shape, np.uint8)
    padded[:, top : top + height, left : left + width] = image
    return padded.astype(np.float32) / 127.5 - 1
