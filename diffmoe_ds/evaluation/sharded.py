"""Rows of features sharded over the ranks, read by index or block by block.

Legend: N rows over all ranks, B rows of a block, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_gather, all_reduce, broadcast, get_rank, get_world_size

BLOCK_ROWS = 2048
"""Rows per block; the distances between two blocks take 32 MB."""


class Block(NamedTuple):
    """Consecutive rows."""

    start: int
    """Index of the first row."""
    rows_BF: Tensor
    """The rows, as they are stored."""


class ShardedRows:
    """Rows [N, F] in contiguous shards, in rank order; with one rank, plain rows.

    Every rank must call the same methods in the same order.
    """

    def __init__(self, local_NF: Tensor, world: int | None = None) -> None:
        """Wrap this rank's shard.

        Args:
            local_NF: this rank's rows on the CPU; may be empty.
            world: number of ranks; with 1, no process group is needed. Default: that of the process group.
        """
        self.local = local_NF
        """This rank's rows."""
        self.world = world or get_world_size()
        counts = [len(local_NF)]
        if self.world > 1:
            counts = [int(count) for count in torch.cat(all_gather(torch.tensor([len(local_NF)]))).tolist()]
        self.counts = counts
        """Rows of every rank."""
        self.rank = get_rank() if self.world > 1 else 0
        self.start = sum(counts[: self.rank])
        """Index of this rank's first row."""

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def num_features(self) -> int:
        """F."""
        return self.local.shape[1]

    def take(self, indices: np.ndarray) -> Tensor:
        """Return the rows at some indices, the same on every rank.

        Args:
            indices: int64 [B], the same on every rank.
        """
        if self.world == 1:
            return self.local[torch.from_numpy(indices)]
        mine = (indices >= self.start) & (indices < self.start + len(self.local))
        rows_BF = self.local.new_zeros(len(indices), self.num_features)
        rows_BF[torch.from_numpy(mine)] = self.local[torch.from_numpy(indices[mine] - self.start)]
        return all_reduce(rows_BF)  # all other ranks add 0, so this is exact

    def blocks(self) -> Iterator[Block]:
        """Yield all rows of all ranks in order, in blocks; every rank must exhaust the iterator."""
        start = 0
        for source, count in enumerate(self.counts):
            for first in range(0, count, BLOCK_ROWS):
                held = min(BLOCK_ROWS, count - first)
                if self.world == 1 or source == self.rank:
                    rows_BF = self.local[first : first + held].contiguous()
                else:
                    rows_BF = self.local.new_empty(held, self.num_features)
                if self.world > 1:
                    broadcast(rows_BF, source)
                yield Block(start + first, rows_BF)
            start += count

    def gathered(self, values_N: Tensor) -> Tensor:
        """Gather one value per row, [N] on every rank, from the values of each rank's rows."""
        if self.world == 1:
            return values_N
        every_N = values_N.new_zeros(len(self))
        every_N[self.start : self.start + len(values_N)] = values_N
        return all_reduce(every_N)
