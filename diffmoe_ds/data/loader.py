"""Micro-batches by position: what a rank reads depends on where the run is, not on who reads it.

Step s of the run begins at position P0 = start + s * global_batch.  In its micro-step m, rank r of W reads the
positions P0 + (m * W + r) * B + [0, B) for micro-batches of B images.  Ranks, accumulation and workers can
change between two halves of a run, and the images, their order and their random draws stay the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from diffmoe_ds.data.draws import TrainingDraws
from diffmoe_ds.data.latents import LatentFormat
from diffmoe_ds.data.order import Order, WholeOrder, WindowOrder
from diffmoe_ds.data.shards import Sample
from diffmoe_ds.data.tar_index import NO_LABEL
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
    posterior: torch.Tensor | None = None  # float32 [B, C, H, W]: noise for x that a VAE has still to encode

    def to(self, device: torch.device) -> MicroBatch:
        """On a device; does not wait for the copies."""
        return MicroBatch(*(None if field is None else field.to(device, non_blocking=True) for field in self))


class Dataset(Protocol):
    """What the loader needs of a data set; ``shards.ShardDataset`` is one."""

    @property
    def labels(self) -> np.ndarray:
        """int64 ``[n]``; all ``NO_LABEL`` in a set without labels."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """How many samples in a row belong together, for shuffling in windows."""

    @property
    def latents(self) -> LatentFormat | None:
        """If there is one, samples are read by ``read_halves``, otherwise one by one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def read_halves(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray: ...
    def describe(self, index: int) -> str: ...
    def prefetch(self, shards: Iterable[int]) -> None: ...


class PositionLoader:
    """An endless iterable of one rank's micro-batches; each ``iter()`` begins again at ``start_position``.

    ``image_shape`` is the (C, H, W) of ``x``: smaller images are padded centrally with black, latents must fit
    exactly.  ``draws`` maps a position to its ``TrainingDraws``.  A ``shuffle_window`` of 0 shuffles across the whole
    set.  The workers live as long as the iterator, which is the whole run, since it has no end; each holds at most
    ``PREFETCHED_PER_WORKER`` micro-batches, and the index and the order of an epoch are all that grows with the set.

    A set without labels trains as one class: every label is 0.

    Raises ``DataError`` if the labels do not fit ``num_classes`` or the latents ``image_shape``; iterating raises it
    for a sample that cannot be read or does not fit.
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
        shuffle_window: int = 0,
        draws: Callable[[int], TrainingDraws],
    ):
        assert global_batch == micro_batch * accumulation * world, (global_batch, micro_batch, accumulation, world)
        assert 0 <= rank < world and start_position >= 0, (rank, world, start_position)
        _check_labels(dataset, num_classes)
        _check_latents(dataset.latents, image_shape)
        if shuffle_window:
            order = WindowOrder(seed, dataset.shard_sizes, shuffle_window)
        else:
            order = WholeOrder(seed, len(dataset))
        self._loader = torch.utils.data.DataLoader(
            _Reader(dataset, order, image_shape, draws),
            sampler=_Positions(start_position + rank * micro_batch, micro_batch, world * micro_batch),
            batch_size=None,  # one item of the sampler is already a micro-batch
            num_workers=num_workers,
            prefetch_factor=PREFETCHED_PER_WORKER if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else making an iterator would draw from the global generator
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        for item in self._loader:
            if isinstance(item, DataError):
                raise item
            x, noise, *posterior = _split(item.large, item.shapes)
            small = (torch.from_numpy(field) for field in (item.label, item.time, item.drop, item.position))
            label, when, drop, position = small
            yield MicroBatch(x, label, noise, when, drop, position, *posterior)


class _Packed(NamedTuple):
    """A micro-batch on its way from a worker.

    Each tensor travels through a piece of shared memory of its own, which costs more than reading an image does; so
    all large fields travel as one, and the small ones go with the message.
    """

    large: torch.Tensor  # float32, flat: x, noise and, where x is still to be encoded, posterior
    shapes: list[tuple[int, ...]]
    label: np.ndarray
    time: np.ndarray
    drop: np.ndarray
    position: np.ndarray


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
    order: Order
    image_shape: tuple[int, int, int]
    draws: Callable[[int], TrainingDraws]

    def __getitem__(self, positions: range) -> _Packed | DataError:
        try:
            return self._micro_batch(positions)
        except DataError as error:
            return error  # raised in a worker it would come back with a traceback in its message

    def _micro_batch(self, positions: range) -> _Packed:
        draws = [self.draws(position) for position in positions]
        indices = [self.order(position) for position in positions]
        self.dataset.prefetch(self.order.next_shards(positions[-1]))
        count, latents = len(positions), self.dataset.latents
        shapes = [(count, *self.image_shape), (count, *draws[0].noise.shape)]
        if draws[0].posterior is not None and latents is None:
            shapes.append((count, *draws[0].posterior.shape))
        large = _new(sum(map(math.prod, shapes)))
        x, noise, *posterior = (part.numpy() for part in _split(large, shapes))
        np.stack([each.noise for each in draws], out=noise)
        for out in posterior:
            np.stack([each.posterior for each in draws], out=out)
        if latents is None:
            self._pixels(indices, draws, x)
        else:
            self._latents(indices, draws, latents, x)
        labels = self.dataset.labels[indices]
        return _Packed(
            large=large,
            shapes=shapes,
            label=np.where(labels == NO_LABEL, 0, labels),
            time=np.array([each.time for each in draws], np.float32),
            drop=np.array([each.drop for each in draws], bool),
            position=np.array(positions, np.int64),
        )

    def _latents(self, indices: list[int], draws: list[TrainingDraws], latents: LatentFormat, out: np.ndarray) -> None:
        assert draws[0].posterior is not None, "draws for prepared latents need posterior=True"
        noise = np.stack([each.posterior for each in draws])
        moments = latents.decode(self.dataset.read_halves(indices, [each.flip for each in draws]))
        latents.sample(moments, noise, out)
        if not np.isfinite(out).all():
            bad = int(np.argmin(np.isfinite(out).all(axis=(1, 2, 3))))
            raise DataError(f"{self.dataset.describe(indices[bad])} has a latent that is not finite")

    def _pixels(self, indices: list[int], draws: list[TrainingDraws], out: np.ndarray) -> None:
        for row, (index, each) in enumerate(zip(indices, draws, strict=True)):
            image = self.dataset[index].image
            self._check(image, index)
            out[row] = _model_range(image[:, :, ::-1] if each.flip else image, self.image_shape)

    def _check(self, image: np.ndarray, index: int) -> None:
        expected = self.image_shape
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


def _as_it_is(item: _Packed | DataError) -> _Packed | DataError:
    return item


def _new(size: int) -> torch.Tensor:
    """An empty float32 tensor, in a worker in memory that is shared already, so that sending it copies nothing."""
    empty = torch.empty(size)
    return empty.share_memory_() if torch.utils.data.get_worker_info() is not None else empty


def _split(large: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The tensors of these shapes that lie one after the other in a flat one."""
    parts = large.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _check_labels(dataset: Dataset, num_classes: int) -> None:
    labels = dataset.labels
    if labels[0] == NO_LABEL:  # then all are, see ShardDataset
        if num_classes > 1:
            raise DataError(
                f"{dataset.describe(0)} has no label, nor have the others, but the model has {num_classes} classes; "
                "a set without labels trains with model.num_classes 1"
            )
    elif labels.max() >= num_classes:
        index = int(np.argmax(labels >= num_classes))
        raise DataError(
            f"{dataset.describe(index)} has the label {labels[index]}; "
            f"the model has {num_classes} classes, 0 to {num_classes - 1}"
        )


def _check_latents(latents: LatentFormat | None, shape: tuple[int, int, int]) -> None:
    if latents is not None and latents.shape != shape:
        raise DataError(
            f"the shards hold latents of shape {latents.shape}; the model takes {shape}: set model.in_channels to "
            f"{latents.channels} and model.input_size to {latents.size}"
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
