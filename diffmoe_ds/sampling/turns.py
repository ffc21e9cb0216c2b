"""Deal a set of images to ranks: in shards of whole batches that do not depend on the number of ranks.

Images of a batch may compete for experts, so which images share a batch must not depend on who generates them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_SHARDS = 1000
"""Largest number of shards: every shard is a file until the set is complete."""


@dataclass(frozen=True)
class Shard:
    """Consecutive images that one rank generates and that are kept in one file."""

    number: int
    """From 0."""
    images: range
    """Indices of the images."""


@dataclass(frozen=True)
class Turn:
    """What one rank does while the others generate one batch each."""

    images: range
    """Indices of the images to generate as one batch; empty if the rank has nothing to do."""
    shard: Shard | None
    """The shard that the images belong to; None if they are discarded."""
    images_everywhere: int
    """Images that all ranks together generate in this turn and keep."""

    @property
    def completes_shard(self) -> bool:
        """Whether this is the last batch of the shard."""
        return self.shard is not None and self.images.stop == self.shard.images.stop


def images_per_shard(num_images: int, batch_size: int) -> int:
    """Return the images of a shard: one batch, or several if there would be more than `MAX_SHARDS` shards."""
    return batch_size * math.ceil(num_images / (batch_size * MAX_SHARDS))


def split(num_images: int, shard_images: int) -> list[Shard]:
    """Return the shards of images 0 to ``num_images - 1``; the last one may be smaller."""
    starts = range(0, num_images, shard_images)
    return [Shard(n, range(start, min(start + shard_images, num_images))) for n, start in enumerate(starts)]


def rounds(shards: Sequence[Shard], finished: Sequence[bool], world: int, in_step: bool) -> list[list[Shard]]:
    """Group the shards that must be generated into rounds, in which every rank generates at most one.

    Args:
        shards: all shards.
        finished: for each shard, whether it exists already.
        world: number of ranks.
        in_step: ranks share experts. What they compute together then affects the rounding of their images, so rounds
            are those of a run that was never interrupted, and a round with an unfinished shard is repeated.

    Returns:
        For each round, the shard of each rank, in order; fewer than ``world`` in the last round.
    """
    if in_step:
        every = [shards[i : i + world] for i in range(0, len(shards), world)]
        return [list(group) for group in every if not all(finished[shard.number] for shard in group)]
    missing = [shard for shard in shards if not finished[shard.number]]
    return [missing[i : i + world] for i in range(0, len(missing), world)]


def deal(groups: Sequence[Sequence[Shard]], batch_size: int, rank: int, in_step: bool, unused: int) -> Iterator[Turn]:
    """Return the turns of one rank; all ranks have equally many.

    Args:
        groups: from `rounds`.
        batch_size: images per batch.
        rank: this rank.
        in_step: ranks share experts, so in every turn all of them generate a batch of the same size; a rank without
            such a batch generates one that is discarded.
        unused: index of an image outside the set, from which on discarded images are numbered.

    Yields:
        One turn after the other.
    """
    for group in groups:
        batches = [list(_batches(shard, batch_size)) for shard in group]
        for position in range(max(map(len, batches))):
            row = [own[position] if position < len(own) else range(0) for own in batches]
            mine = row[rank] if rank < len(row) else range(0)
            shard = group[rank] if mine else None
            if not in_step:
                yield Turn(mine, shard, sum(map(len, row)))
                continue
            for size in sorted({len(batch) for batch in row if batch}, reverse=True):
                everywhere = sum(len(batch) for batch in row if len(batch) == size)
                if len(mine) == size:
                    yield Turn(mine, shard, everywhere)
                else:
                    yield Turn(range(unused, unused + size), None, everywhere)


def _batches(shard: Shard, batch_size: int) -> Iterator[range]:
    for start in range(0, len(shard.images), batch_size):
        yield shard.images[start : start + batch_size]
