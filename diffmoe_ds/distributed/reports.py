"""What every rank tells rank 0 when it joins."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    world: int = 0
    """The number of ranks according to its launcher."""


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


def check_same(reports: Sequence[Report]) -> None:
    """Verify that all ranks have the same number of ranks and the same configuration as rank 0.

    Args:
        reports: the report of every rank, by rank.

    Raises:
        LaunchError: a rank has not.
    """
    first = reports[0]
    for rank, report in enumerate(reports):
        if report.world != first.world:
            raise LaunchError(
                f"rank {rank} on {report.host} was started as one of {report.world} ranks, but rank 0 on {first.host} "
                f"as one of {first.world}; start all ranks with the same WORLD_SIZE."
            )
        if report.fingerprint != first.fingerprint:
            raise LaunchError(
                f"rank {rank} on {report.host} resolved a different configuration than rank 0 on {first.host}; "
                "compare the files, the package versions and the number of ranks per host."
            )
