"""What every rank tells rank 0 when it joins."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch.distributed as dist

from diffmoe_ds.distributed.store import answer_within
from diffmoe_ds.errors import LaunchError


@dataclass(frozen=True)
class Report:
    """What a rank tells rank 0 when it joins."""

    host: str
    """Its host."""
    fingerprint: str
    """What must be equal on all ranks, such as a hash of the resolved configuration."""
    gpu: str
    """What identifies its GPU on the host; see `gpu_of`."""
    process: int
    """Its process id, which tells it from another process of the same rank."""
    error: int = 0
    """An error that it has already hit, encoded; see `encode_error`."""


def write_report(store: dist.Store, rank: int, report: Report, silence_s: float) -> None:
    """Write a rank's report into the store, unless another process has already joined as the same rank.

    Args:
        store: from `open_store`.
        rank: the rank.
        report: its report.
        silence_s: seconds that the store may go without answering.

    Raises:
        LaunchError: another process has; its report stays.
        TimeoutError: the store does not answer.
    """
    mine = asdict(report)
    text = answer_within(silence_s, lambda: store.compare_set(f"rank/{rank}", "", json.dumps(mine)))
    first = json.loads(text)
    if first != mine:
        raise LaunchError(
            f"rank {rank} on {report.host}: process {first['process']} on {first['host']} has already joined as this "
            "rank; start every rank once, and end processes of an earlier launch that still wait to join."
        )
