"""The host memory of the ranks and of their loader workers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from diffmoe_ds.distributed.collectives import all_gather
from diffmoe_ds.text import counted


class HostMemory(NamedTuple):
    """What a rank and its loader workers take.

    Workers are forked and share most of their resident memory with their rank, so a page that N of them share counts
    as 1/N of a page in each (the proportional set size). A worker adds only the pages that nobody shares.
    """

    total_mb: float
    """MiB of the rank and its workers; 0 if the system does not report it."""
    workers: int
    """Number of workers."""
    worker_mb: float
    """MiB that each worker adds, on average."""


def measure_host_memory() -> HostMemory:
    """Return the memory of this process and its workers."""
    with suppress(OSError, ValueError):  # not Linux, or a worker that has just ended
        own = _sizes_mb(os.getpid())
        workers = [_sizes_mb(child.pid) for child in multiprocessing.active_children()]
        added = sum(sizes["Private_Clean"] + sizes["Private_Dirty"] for sizes in workers)
        total = sum(sizes["Pss"] for sizes in (own, *workers))
        return HostMemory(total, len(workers), added / max(len(workers), 1))
    return HostMemory(0, 0, 0)


def gather_host_memory(device: torch.device) -> list[HostMemory]:
    """Return the memory of every rank, in order. Every rank must call this.

    Args:
        device: device for the tensors of the collective.
    """
    mine = torch.tensor(measure_host_memory(), dtype=torch.float64, device=device)
    return [
        HostMemory(total, int(workers), worker) for total, workers, worker in torch.stack(all_gather(mine)).tolist()
    ]


def largest(ranks: Sequence[HostMemory]) -> int:
    """Return the rank that takes most."""
    return max(range(len(ranks)), key=lambda rank: ranks[rank].total_mb)


def describe_largest(ranks: Sequence[HostMemory]) -> str:
    """Return a sentence about the rank that takes most."""
    rank = largest(ranks)
    total_mb, workers, worker_mb = ranks[rank]
    text = f"rank {rank} takes {total_mb:,.0f} MB of host memory"
    if workers:
        text += f" with {counted(workers, 'loader worker')}, {worker_mb:,.0f} MB for each of them"
    return text if len(ranks) == 1 else f"{text}; the most of {len(ranks):,} ranks"


def _sizes_mb(pid: int | None) -> dict[str, float]:
    """Return the sums over all mappings of a process, in MiB."""
    _, *lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {name: int(size.split()[0]) / 2**10 for name, _, size in (line.partition(":") for line in lines)}
