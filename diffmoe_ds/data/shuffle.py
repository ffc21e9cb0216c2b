"""Shuffling: a pure function of the seed and the epoch.

A *position* counts the images of a run from 0.  For n images, position p reads image p % n of epoch p // n, on any
rank and at any batch size.  Every epoch reads every image exactly once.

There are three shuffles.  `FeistelShuffle` and `WholeShuffle` permute the whole dataset, which mixes best but reads
from all shards at all times; the first computes its permutation, the second stores it.  `WindowShuffle` shuffles the
shards, concatenates them and shuffles within consecutive windows, so it needs only the shards of a window at a time;
how well it mixes depends on the size of the window and on the shards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diffmoe_ds.data.feistel import ROUNDS, permute
from diffmoe_ds.rng import Purpose, philox

FEISTEL_BLOCK = 256
"""Consecutive positions whose images are computed together, which takes hardly longer than computing a single one."""


class Shuffle(Protocol):
    """Maps positions to images."""

    def __call__(self, position: int) -> int:
        """Return the image that a position reads."""

    def next_shards(self, position: int) -> Sequence[int]:
        """Return the shards that are needed soon after a position, so that they can be prefetched."""


@dataclass(frozen=True)
class FeistelShuffle:
    """Each epoch is a pseudo-random permutation of all images, whose memory does not depend on their number."""

    seed: int
    n: int
    """Images of the dataset."""

    def __call__(self, position: int) -> int:
        epoch, index = locate(position, self.n)
        block, place = divmod(index, FEISTEL_BLOCK)
        return int(_feistel_block(self.seed, epoch, self.n, block)[place])

    def next_shards(self, position: int) -> Sequence[int]:
        return ()  # any shard may be needed at any time


@dataclass(frozen=True)
class WholeShuffle:
    """Each epoch is a permutation of all images, sorted and stored by every process: 20 bytes an image at its peak."""

    seed: int
    n: int
    """Images of the dataset."""

    def __call__(self, position: int) -> int:
        return sample_index(self.seed, position, self.n)

    def next_shards(self, position: int) -> Sequence[int]:
        return ()  # any shard may be needed at any time


class WindowShuffle:
    """Shuffles the shards, then the images within windows; the last window of an epoch may be smaller."""

    def __init__(self, seed: int, shard_sizes: Sequence[int], window: int) -> None:
        """Prepare the shuffle; windows are computed when they are needed.

        Args:
            seed: seed of the run.
            shard_sizes: images of each shard, in the order in which the dataset numbers its images.
            window: images per window.
        """
        self._seed = seed
        self._sizes = np.array(shard_sizes, np.int64)
        self._n = int(self._sizes.sum())
        self._window = window
        self._kept: dict[tuple[int, int], np.ndarray] = {}  # a micro-batch reads from one or two
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
            shards = _permutation(self._seed, Purpose.SHARD_SHUFFLE, epoch, len(self._sizes))
            ends = np.cumsum(self._sizes[shards])
            first, last = np.searchsorted(ends, [start, min(start + self._window, self._n) - 1], side="right")
            self._next = (epoch, start), shards[first : last + 1].tolist()
        return self._next[1]

    def _images(self, epoch: int, number: int) -> np.ndarray:
        """Return the images of a window as they are read, int64."""
        shards = _permutation(self._seed, Purpose.SHARD_SHUFFLE, epoch, len(self._sizes))
        sizes = self._sizes[shards]
        ends = np.cumsum(sizes)  # of each shard, in shuffled order
        start = number * self._window
        places = np.arange(start, min(start + self._window, self._n))
        rank = np.searchsorted(ends, places, side="right")  # the shard of each place; empty shards hold none
        first_image = (np.cumsum(self._sizes) - self._sizes)[shards]
        images = first_image[rank] + places - (ends - sizes)[rank]
        windows = -(-self._n // self._window)
        shuffled: np.ndarray = images[
            _permutation(self._seed, Purpose.WINDOW_SHUFFLE, epoch * windows + number, len(images))
        ]
        return shuffled


@functools.lru_cache(maxsize=2)  # a small micro-batch reads from one block, or from two at a border
def _feistel_block(seed: int, epoch: int, n: int, block: int) -> np.ndarray:
    """Return a block of the permutation that an epoch reads, int64 [at most FEISTEL_BLOCK]."""
    keys = philox(seed, Purpose.FEISTEL_SHUFFLE, epoch).random_raw(ROUNDS)
    first = block * FEISTEL_BLOCK
    return permute(np.arange(first, min(first + FEISTEL_BLOCK, n), dtype=np.uint64), n, keys)


@functools.lru_cache(maxsize=2)  # a micro-batch reads from one epoch, or from two at a border
def epoch_shuffle(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of `range(n)` that an epoch reads: int64 [n], read-only."""
    permutation = _permutation(seed, Purpose.SHUFFLE, epoch, n)
    permutation.flags.writeable = False
    return permutation


def _permutation(seed: int, purpose: Purpose, index: int, n: int) -> np.ndarray:
    # Sorts raw Philox words: NumPy guarantees that these never change, unlike the output of Generator.permutation.
    return np.argsort(philox(seed, purpose, index).random_raw(n), kind="stable")


def locate(position: int, n: int) -> tuple[int, int]:
    """Return the epoch of a position and its index within that epoch, for `n` images."""
    return divmod(position, n)


def sample_index(seed: int, position: int, n: int) -> int:
    """Return which of `n` images a position reads."""
    epoch, index_in_epoch = locate(position, n)
    return int(epoch_shuffle(seed, epoch, n)[index_in_epoch])
