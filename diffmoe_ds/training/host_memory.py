"""The host memory of this rank and of its loader workers."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress
from pathlib import Path

from diffmoe_ds.text import counted


def describe_host_memory() -> str | None:
    """Return what this process and its loader workers take; None if the system does not report it.

    Workers are forked and share most of their resident memory with this process, so a page that N of them share counts
    as 1/N of a page in each (the proportional set size). A worker adds only the pages that nobody shares.
    """
    with suppress(OSError, ValueError):  # not Linux, or a worker that has just ended
        own = _sizes_mb(os.getpid())
        workers = [_sizes_mb(child.pid) for child in multiprocessing.active_children()]
        total = sum(sizes["Pss"] for sizes in (own, *workers))
        if not workers:
            return f"{total:,.0f} MB of host memory"
        mean = sum(sizes["Private_Clean"] + sizes["Private_Dirty"] for sizes in workers) / len(workers)
        count = counted(len(workers), "loader worker")
        return f"{total:,.0f} MB of host memory with {count}, {mean:,.0f} MB for each of them"
    return None


def _sizes_mb(pid: int | None) -> dict[str, float]:
    """Return the sums over all mappings of a process, in MiB."""
    _, *lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {name: int(size.split()[0]) / 2**10 for name, _, size in (line.partition(":") for line in lines)}
