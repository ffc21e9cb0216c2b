"""`torch.distributed` collectives with timers that measure how long a rank waits for the others.

All ranks finish a step together, so the length of a step does not show which rank is slow; the time a rank spends
outside collectives does (`diffmoe_ds.distributed.stragglers`). Timing is off by default and then costs nothing.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

# Its defaults refer to the world's group as it is at import. Without this import, torch imports it after that group
# was created, the first time anything needs torch._dynamo, and the group could not be destroyed any more.
import torch.distributed.nn.functional
from torch import Tensor

Group = dist.ProcessGroup
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Waiting:
    """A stopwatch that runs inside collectives."""

    def __init__(self) -> None:
        self.on = False
        """Whether to measure. On a GPU this synchronizes at every collective, so turn it on for a few steps only."""
        self.seconds = 0.0
        """Time spent in collectives while measuring."""
        self._start = 0.0

    def __enter__(self) -> None:
        if self.on:
            self._start = now()

    def __exit__(self, *_: object) -> None:
        if self.on:
            self.seconds += now() - self._start


def now() -> float:
    """Synchronize the GPU and return a time in seconds."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


WAITING = Waiting()
"""The stopwatch of this process."""


def init_process_group(backend: str, init_method: str, timeout_s: float | None = None) -> None:
    """Create the default process group.

    Args:
        backend: ``gloo`` or ``nccl``.
        init_method: from `rendezvous.Rendezvous.init_method`.
        timeout_s: seconds after which a collective fails; torch's default if None.
    """
    dist.init_process_group(backend, init_method, None if timeout_s is None else timedelta(seconds=timeout_s))


def get_rank(group: Group | None = None) -> int:
    """Return this process's rank in a group (default: the world)."""
    return dist.get_rank(group)


def get_world_size(group: Group | None = None) -> int:
    """Return the number of ranks in a group (default: the world)."""
    return dist.get_world_size(group)


def all_reduce(tensor: Tensor, op: Literal["sum", "max", "min"] = "sum", group: Group | None = None) -> Tensor:
    """Reduce a tensor over the ranks, in place.

    Args:
        tensor: contiguous; same shape and dtype on every rank.
        op: the reduction.
        group: the ranks; the world if None.

    Returns:
        The same tensor.
    """
    with WAITING:
        dist.all_reduce(tensor, op=_OPS[op], group=group)
    return tensor


def all_gather(tensor: Tensor, group: Group | None = None) -> list[Tensor]:
    """Return the tensor of every rank, by rank.

    Args:
        tensor: same shape and dtype on every rank.
        group: the ranks; the world if None.
    """
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with WAITING:
        dist.all_gather(every, tensor.contiguous(), group=group)
    return every


def gather_to_main(tensor: Tensor) -> list[Tensor] | None:
    """Return the tensor of every rank on rank 0, None elsewhere; same shape and dtype on every rank."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    with WAITING:
        dist.gather(tensor, every)
    return every


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite a tensor with the one of rank ``source``, and return it."""
    with WAITING:
        dist.broadcast(tensor, src=source)
    return tensor


def all_to_all(tensor: Tensor, group: Group | None = None) -> Tensor:
    """Exchange equal slices of the first dimension between all pairs of ranks.

    Args:
        tensor: slices to send, ordered by destination rank.
        group: the ranks; the world if None.

    Returns:
        The received slices, ordered by source rank.
    """
    out = torch.empty_like(tensor)
    with WAITING:
        dist.all_to_all_single(out, tensor.contiguous(), group=group)
    return out


class Exchange:
    """An all-to-all of rows that runs while this rank computes something else."""

    def __init__(self, rows_RD: Tensor, sent: list[int], received: list[int], group: Group) -> None:
        """Start the exchange. Every rank of the group must call this.

        Args:
            rows_RD: rows to send, ordered by destination rank.
            sent: rows sent to each rank; may be 0.
            received: rows received from each rank.
            group: the ranks.
        """
        sent_RD = rows_RD.contiguous()
        self.rows = rows_RD.new_empty((sum(received), *rows_RD.shape[1:]))
        """The received rows, ordered by source rank; valid after `wait`."""
        work = dist.all_to_all_single(self.rows, sent_RD, received, sent, group=group, async_op=True)
        assert work is not None, "every rank is in its EP group"
        self._in_flight: tuple[dist.Work, Tensor] | None = work, sent_RD

    def wait(self) -> Tensor:
        """Return the received rows; on a GPU only its current stream waits for them, not the host."""
        if self._in_flight is not None:
            work, _ = self._in_flight
            with WAITING:
                work.wait()
            self._in_flight = None  # the rows that were sent may be freed
        return self.rows


def barrier() -> None:
    """Wait until every rank calls this."""
    with WAITING:
        dist.barrier()
