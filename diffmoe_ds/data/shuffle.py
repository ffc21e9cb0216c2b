"""The order of the images: a pure function of the seed and the epoch.

A *position* is the running number of an image in the whole run, from 0.  Position p reads image p % n of epoch
p // n, for n images, on whichever rank and at whatever batch size.  Every epoch reads every image exactly once.

Two orders.  *Whole*: a permutation of the whole set, the best there is, but it jumps through all shards.  *Window*:
the shards are shuffled, laid end to end and shuffled inside consecutive windows, so that only the shards of a window
are needed at a time; how well it mixes depends on the window and on how mixed the shards are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diffmoe_ds.rng import Purpose, philox


class Order(Protocol):
    """Which image a position reads."""

    def __call__(self, position: int) -> int: ...

    def next_shards(self, position: int) -> Sequence[int]:
        """The shards that will be needed some time after ``position``, to be fetched ahead."""


@dataclass(frozen=True)
class WholeOrder:
    """Every epoch is a permutation of all ``n`` images."""

    seed: int
    n: int

    def __call__(self, position: int) -> int:
        return sample_index(self.seed, position, self.n)

    def next_shards(self, position: int) -> Sequence[int]:
        return ()  # all of them at any time


class WindowOrder:
    """Shuffled shards, shuffled again inside windows of ``window`` images; the last window may be smaller.

    ``shard_sizes`` is the number of images of each shard, in the order in which the data set numbers its images.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int], window: int):
        self._seed = seed
        self._sizes = np.array(shard_sizes, np.int64)
        self._n = int(self._sizes.sum())
        self._window = window
        self._kept: dict[tuple[int, int], np.ndarray] = {}  # a micro-batch touches one window, or two at a border
        self._next: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def __call__(self, position: int) -> int:
        epoch, index = locate(position, self._n)
        number, place = divmod(index, self._window)
        if (epoch, number) not in self._kept:
            if len(self._kept) == 2:
                del self._kept[min(self._kept)]
            self._kept[epoch, number] = self._images(epoch, number)
        return int(self._kept[epoch, number][place])

    def next_shards(self, position: int) -> Sequence[int]:
        epoch, index = locate(position, self._n)
        start = (index // self._window + 1) * self._window
        if start >= self._n:
            epoch, start = epoch + 1, 0
        if self._next[0] != (epoch, start):
            shards = _permutation(self._seed, Purpose.SHARD_ORDER, epoch, len(self._sizes))
            ends = np.cumsum(self._sizes[shards])
            first, last = np.searchsorted(ends, [start, min(start + self._window, self._n) - 1], side="right")
            self._next = (epoch, start), shards[first : last + 1].tolist()
        return self._next[1]

    def _images(self, epoch: int, number: int) -> np.ndarray:
        """The images of a window in the order in which they are read, int64."""
        shards = _permutation(self._seed, Purpose.SHARD_ORDER, epoch, len(self._sizes))
        sizes = self._sizes[shards]
        ends = np.cumsum(sizes)  # of each shard, laid end to end
        start = number * self._window
        places = np.arange(start, min(start + self._window, self._n))
        rank = np.searchsorted(ends, places, side="right")  # the shard of each place; empty shards have none
        first_image = (np.cumsum(self._sizes) - self._sizes)[shards]
        images = first_image[rank] + places - (ends - sizes)[rank]
        windows = -(-self._n // self._window)
        return images[_permutation(self._seed, Purpose.WINDOW_ORDER, epoch * windows + number, len(images))]


@functools.lru_cache(maxsize=2)  # a micro-batch touches one epoch, or two where it straddles their border
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of ``range(n)`` in which ``epoch`` reads the images: int64 ``[n]``, read-only."""
    order = _permutation(seed, Purpose.ORDER, epoch, n)
    order.flags.writeable = False
    return order


def _permutation(seed: int, purpose: Purpose, index: int, n: int) -> np.ndarray:
    # Sorting the raw Philox words, because NumPy promises these for ever but not Generator.permutation's choices.
    return np.argsort(philox(seed, purpose, index).random_raw(n), kind="stable")


def locate(position: int, n: int) -> tuple[int, int]:
    """The epoch of ``position`` and its index in that epoch, for ``n`` images."""
    return divmod(position, n)


def sample_index(seed: int, position: int, n: int) -> int:
    """Which of the ``n`` images ``position`` reads."""
    epoch, index_in_epoch = locate(position, n)
    return int(epoch_order(seed, epoch, n)[index_in_epoch])
