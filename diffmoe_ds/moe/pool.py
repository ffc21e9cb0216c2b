"""A pool of tokens that is spread over the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.collectives import WAITING


class GroupPool:
    """The `Pool` of a process group.  Counts travel as int32: a pool holds fewer than 2^31 tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)

    def sum(self, counts: Tensor) -> Tensor:
        """Sum over the ranks of the group, one all-reduce."""
        total = counts.to(torch.int32)
        with WAITING:
            dist.all_reduce(total, group=self.group)
        return total.to(counts.dtype)

    def sum_before(self, counts: Tensor) -> Tensor:
        """Sum over the ranks before this one, one all-gather."""
        mine = counts.to(torch.int32)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with WAITING:
            dist.all_gather(every, mine, group=self.group)
        return torch.stack(every)[: self._rank].sum(0).to(counts.dtype)
