"""Straggler detection: every N steps the ranks compare how long their own work takes.

Own work is data loading and the forward pass without its collectives: that is where a slow disk, a busy host or a
throttled GPU shows. A few steps out of every N are measured, and one number per rank is gathered.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from diffmoe_ds.distributed.collectives import WAITING, all_gather, now

MEASURED_STEPS = 5
"""Steps measured before each comparison; their median is compared, so that a single slow step is ignored."""


@dataclass(frozen=True)
class Comparison:
    """The slowest rank compared with the others."""

    rank: int
    """The slowest rank."""
    host: str
    """Its host."""
    seconds: float
    """Seconds of its own work per step."""
    others: float
    """The median of the same over the other ranks."""
    is_straggler: bool
    """Whether `ratio` exceeds ``run.straggler_ratio``."""

    @property
    def ratio(self) -> float:
        """The slowest rank's time over the others'."""
        return self.seconds / max(self.others, 1e-9)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} takes {self.seconds:.3f} s per step for data loading and forward, "
            f"{self.ratio:.1f}x the other ranks' {self.others:.3f} s"
        )


class Stragglers:
    """Measures this rank's own work and compares it with the other ranks'; every rank has one."""

    def __init__(self, every_steps: int, ratio: float, hosts: tuple[str, ...], device: torch.device) -> None:
        """Configure the measurement.

        Args:
            every_steps: optimizer steps between two comparisons; 0 disables them.
            ratio: a rank this many times slower than the others is a straggler.
            hosts: the host of every rank.
            device: device for the tensors of the collectives.
        """
        self._every = every_steps if len(hosts) > 1 else 0
        self._ratio = ratio
        self._hosts = hosts
        self._device = device
        self._steps: list[float] = []
        self._step = 0.0

    @contextmanager
    def own_work(self, step: int) -> Iterator[None]:
        """Measure the data loading and forward pass of one micro-step.

        Args:
            step: optimizer steps finished before.
        """
        if not self._every or step % self._every < self._every - MEASURED_STEPS:
            yield
            return
        WAITING.on, WAITING.seconds = True, 0.0
        start = now()
        try:
            yield
        finally:
            self._step += now() - start - WAITING.seconds
            WAITING.on = False

    def compare(self, step: int) -> Comparison | None:
        """Compare the ranks, every N steps. Every rank must call this after each step.

        Args:
            step: optimizer steps finished.

        Returns:
            The comparison, on all ranks; None if none is due at this step.
        """
        if self._step:
            self._steps.append(self._step)
            self._step = 0.0
        if not self._every or step % self._every or not self._steps:
            return None
        mine = torch.tensor([statistics.median(self._steps)], dtype=torch.float64, device=self._device)
        self._steps.clear()
        return slowest(torch.cat(all_gather(mine)).tolist(), self._hosts, self._ratio)


def slowest(seconds: list[float], hosts: tuple[str, ...], ratio: float) -> Comparison:
    """Compare the slowest rank with the median of the others.

    Args:
        seconds: own work per step, by rank; at least two ranks.
        hosts: the host of each rank.
        ratio: a rank this many times slower than the others is a straggler.
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
    return Comparison(rank, hosts[rank], seconds[rank], others, seconds[rank] > ratio * others)
