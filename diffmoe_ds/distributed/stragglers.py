"""Which rank makes the others wait?  Every N steps the ranks compare what they need for their own work.

Own work is loading and the forward pass without its collectives (`distributed/collectives.py`): a slow disk, a busy
host, a throttled GPU show there.  A few steps of every N are measured and one number per rank is gathered.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from diffmoe_ds.config.schema import RunConfig
from diffmoe_ds.distributed.collectives import WAITING, now

MEASURED_STEPS = 5
"""Steps measured before each comparison; their median is compared, so that one hiccup is not a straggler."""


@dataclass(frozen=True)
class Comparison:
    """The slowest rank against the others."""

    rank: int
    """The slowest rank."""
    host: str
    """Its host."""
    seconds: float
    """Its own work per step."""
    others: float
    """The median of the other ranks'."""
    is_straggler: bool
    """Whether the ratio of the two is beyond the set one."""

    @property
    def ratio(self) -> float:
        """Slowest over the others."""
        return self.seconds / max(self.others, 1e-9)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} needs {self.seconds:.3f} s a step for loading and forward, "
            f"{self.ratio:.1f} x the others' {self.others:.3f} s"
        )


class Stragglers:
    """Measures this rank; every rank has one."""

    def __init__(self, config: RunConfig, hosts: tuple[str, ...], device: torch.device) -> None:
        """Bind what `train` knows.

        Args:
            config: how often and how slow is too slow.
            hosts: the host of every rank.
            device: where collectives take their tensors.
        """
        self._every = config.straggler_steps if len(hosts) > 1 else 0
        self._ratio = config.straggler_ratio
        self._hosts = hosts
        self._device = device
        self._steps: list[float] = []
        self._step = 0.0

    @contextmanager
    def own_work(self, step: int) -> Iterator[None]:
        """Around loading and forward of a micro-step of the step after ``step`` finished ones."""
        if not self._every or step % self._every < self._every - MEASURED_STEPS:
            yield
            return
        WAITING.on, WAITING.seconds = True, 0.0
        begun = now()
        try:
            yield
        finally:
            self._step += now() - begun - WAITING.seconds
            WAITING.on = False

    def compare(self, step: int) -> Comparison | None:
        """After each step: every N steps the comparison, on all ranks; a collective."""
        if self._step:
            self._steps.append(self._step)
            self._step = 0.0
        if not self._every or step % self._every or not self._steps:
            return None
        mine = torch.tensor([statistics.median(self._steps)], dtype=torch.float64, device=self._device)
        self._steps.clear()
        every = torch.empty(len(self._hosts), dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(every, mine)
        return slowest(every.tolist(), self._hosts, self._ratio)


def slowest(seconds: list[float], hosts: tuple[str, ...], ratio: float) -> Comparison:
    """Compare the slowest rank with the median of the others.

    Args:
        seconds: own work per step of each rank, at least two.
        hosts: the host of each rank.
        ratio: beyond which a rank is a straggler.
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
    return Comparison(rank, hosts[rank], seconds[rank], others, seconds[rank] > ratio * others)
