"""Count what a training step waits for and sends: host synchronizations of this project's code, and collectives."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave.Tensor", "equal", "is_nonzero", "unique",
    "_unique2", "unique_dim", "index.Tensor",
)  # fmt: skip
"""Operators whose result or shape the host has to read from the device; indexing waits for boolean masks only."""
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


class HostWaits(TorchDispatchMode):
    """Counts the places where our code would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._tolist = torch.Tensor.tolist

    def _count(self) -> None:
        place = caller()
        if place is not None:
            self.places[place] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").removesuffix(".default")
        is_mask = name != "index.Tensor" or any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS and is_mask:
            self._count()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        waits, tolist = self, self._tolist

        def counted(tensor):
            waits._count()
            return tolist(tensor)

        torch.Tensor.tolist = counted  # on a CPU it reads memory without calling an operator
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)


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
