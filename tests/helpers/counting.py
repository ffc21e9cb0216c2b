"""Count what a training step waits for and sends: host synchronizations of this project's code, and collectives."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tests.helpers.syncs import SyncCounter

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast", "reduce_scatter")


def caller() -> str | None:
    """Return file:line of the code of ours that called, or None if a library did."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/diffmoe_ds/" in name:
            return f"{name.partition('/diffmoe_ds/')[2]}:{frame.f_lineno}"
        if "/deepspeed/" in name:
            return None
        frame = frame.f_back
    return None


class HostWaits(SyncCounter):
    """Counts the places where our code would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def record(self, kind: str) -> None:
        place = caller()
        if place is None or place.startswith("data/") or kind == "tensor from the host":
            return  # the loader handles host memory only, and tensors from the host are copied without waiting
        self.places[place] += 1


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Count the collectives that our code calls, by name and dtype."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def wrap(name):
        def counted(*arguments, **keywords):
            if caller() is not None:
                dtype = str(arguments[0][0].dtype if isinstance(arguments[0], list) else arguments[0].dtype)
                calls[f"{name} {dtype.removeprefix('torch.')}"] += 1
            return originals[name](*arguments, **keywords)

        return counted

    for name in COLLECTIVES:
        setattr(dist, name, wrap(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
