"""A pool of tokens spread over the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_reduce


class GroupPool:
    """The `Pool` of a process group. Integers are sent as int32: a pool holds fewer than 2^31 tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks of the group, with one all-reduce."""
        dtype = torch.float32 if values.is_floating_point() else torch.int32
        return all_reduce(values.to(dtype, copy=True), group=self.group).to(values.dtype)

    def stack(self, values: Tensor) -> Tensor:
        """Return the int32 values of every rank, with one all-reduce: a tree, where an all-gather would be a ring."""
        every = values.new_zeros((self.size, *values.shape))
        every[self.rank] = values
        return all_reduce(every, group=self.group)
