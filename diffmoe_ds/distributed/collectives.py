"""The time a rank waits for others, taken out of what it needs for its own work.

All ranks finish a step together, so a step's length says nothing about who is slow; the time between the collectives
does.  The collectives of a forward pass are wrapped in ``with WAITING:``, which costs nothing until it is switched on.
"""

from __future__ import annotations

import time

import torch


class Waiting:
    """A stopwatch that runs inside collectives."""

    def __init__(self) -> None:
        self.on = False
        """Whether to measure; on a GPU that waits for the device at every collective, so for a few steps only."""
        self.seconds = 0.0
        """Time spent in collectives while it was on."""
        self._begun = 0.0

    def __enter__(self) -> None:
        if self.on:
            self._begun = now()

    def __exit__(self, *_: object) -> None:
        if self.on:
            self.seconds += now() - self._begun


def now() -> float:
    """Seconds, after everything that was given to the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


WAITING = Waiting()
"""The one of this process."""
