"""Micro-batches by position: what a rank reads depends on where the run is, not on who reads it.

Step s of the run begins at position P0 = start + s * global_batch.  In its micro-step m, rank r of W reads the
positions P0 + (m * W + r) * B + [0, B) for micro-batches of B images.  Ranks, accumulation and workers can
change between two halves of a run, and the images, their order and their random draws stay the same.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from diffmoe_ds.data.reader import Dataset, Packed, Reader, Task, check_labels, check_latents
from diffmoe_ds.data.shuffle import Order, WholeOrder, WindowOrder
from diffmoe_ds.errors import DataError
from diffmoe_ds.rng import TrainingDraws

PREFETCHED_PER_WORKER = 2  # micro-batches each worker may be ahead
SLOTS_PER_WORKER = PREFETCHED_PER_WORKER + 1  # those ahead, and the one that is being copied out


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
        check_labels(dataset, num_classes)
        check_latents(dataset.latents, image_shape)
        if shuffle_window:
            order = WindowOrder(seed, dataset.shard_sizes, shuffle_window)
        else:
            order = WholeOrder(seed, len(dataset))
        self._dataset = dataset
        self._order: Order = order
        self._draws = draws
        self._num_workers = num_workers
        self._positions = _Positions(start_position + rank * micro_batch, micro_batch, world * micro_batch)
        first = draws(start_position)
        shapes = [image_shape, first.noise.shape]
        if first.posterior is not None and dataset.latents is None:
            shapes.append(first.posterior.shape)
        self._shapes = tuple((micro_batch, *shape) for shape in shapes)

    def __iter__(self) -> Iterator[MicroBatch]:
        workers, slots, closing = self._num_workers, None, torch.zeros((), dtype=torch.uint8)
        if workers:
            closing.share_memory_()
            atexit.register(_close, closing)  # runs before multiprocessing's own, which was registered before
            values = sum(math.prod(shape) for shape in self._shapes)
            slots = torch.empty(workers, SLOTS_PER_WORKER, values).share_memory_()
        reader = Reader(self._dataset, self._order, self._draws, self._shapes, slots)
        loader = torch.utils.data.DataLoader(
            reader,
            sampler=self._positions,
            batch_size=None,  # one item of the sampler is already a micro-batch
            num_workers=workers,
            prefetch_factor=PREFETCHED_PER_WORKER if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=functools.partial(_leave_signals_to_the_parent, closing),
            generator=torch.Generator(),  # else making an iterator would draw from the global generator
        )
        for number, item in enumerate(loader):
            if isinstance(item, DataError):
                raise item
            large = item.large
            if large is None:
                slot = reader.slot(number)
                large = torch.empty(slot.shape, pin_memory=torch.cuda.is_available())
                np.copyto(large.numpy(), slot.numpy())  # torch would wake its threads for it
            x, noise, *posterior = reader.split(large)
            small = (torch.from_numpy(field) for field in (item.label, item.time, item.drop, item.position))
            label, time, drop, position = small
            yield MicroBatch(x, label, noise, time, drop, position, *posterior)


@dataclass(frozen=True)
class _Positions:
    """The positions of one rank's micro-batches, endlessly.

    The micro-steps of a step, and the steps themselves, follow each other without a gap, so one stride does.
    """

    first: int
    micro_batch: int
    stride: int

    def __iter__(self) -> Iterator[Task]:
        for number, first in enumerate(itertools.count(self.first, self.stride)):
            yield Task(number, range(first, first + self.micro_batch))


def _as_it_is(item: Packed | DataError) -> Packed | DataError:
    return item


def _close(closing: torch.Tensor) -> None:
    closing.fill_(1)


def _leave_signals_to_the_parent(closing: torch.Tensor, worker: int) -> None:
    """What stops a run gently (Ctrl-C, Slurm's warning, SIGTERM to all processes of a job) must not end its workers.

    The training process stops at the end of a step and needs them until then.  When it ends it marks ``closing``, and
    Python ends its workers by SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.item() else None)
