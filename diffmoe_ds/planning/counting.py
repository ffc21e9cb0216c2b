"""Count what a piece of code allocates and sends: live tensor bytes, and the calls and bytes of every collective.

`Counter` sees every operator below autograd, so it counts real steps on real ranks and simulated steps alike.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
}
"""Operators of ``torch.ops.c10d`` and the collective of each; barriers send no tensors and are left out."""
FIRST_ARGUMENT = ("all_reduce", "all_gather", "broadcast", "reduce")
"""Collectives whose bytes are those of the operator's first argument: the input, or the output of an all-gather. The
other operators have outputs first, then inputs."""


@dataclass
class Traffic:
    """Calls of one collective."""

    calls: int = 0
    """How often it was called."""
    bytes: int = 0
    """Sum over its calls of the larger of what the rank passes in and what it gets out."""


class Counter(TorchDispatchMode):
    """While entered, counts collectives and the bytes of the tensor storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes of all storages seen that are alive."""
        self.peak = 0
        """Maximum of `live` since `reset`."""
        self.operators = 0
        """Operators since `reset`, without views."""
        self.collectives: dict[str, Traffic] = defaultdict(Traffic)
        """Traffic since `reset`, by collective."""
        self.messages: list[tuple[str, int]] = []
        """Collective and bytes of every call since `reset`, in order."""
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def reset(self) -> None:
        """Forget the traffic and start a new peak; what is alive still counts."""
        self.peak = self.live
        self.operators = 0
        self.collectives.clear()
        self.messages.clear()

    def add(self, *tensors: Tensor) -> None:
        """Count tensors that were created before the counter was entered."""
        for tensor in tensors:
            self._count_storage(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += not (func.is_view or func.namespace == "prim")
        if func.namespace == "c10d":
            self._count_collective(func._schema.name.partition("::")[2], args)
        else:
            for tensor in _tensors(result):
                self._count_storage(tensor)
        return result

    def _count_storage(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" and not _is_fake(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        size = storage.nbytes()
        if known is not None:
            if size != known[1]:  # resized in place
                self._storages[key] = (known[0], size)
                self._grow(size - known[1])
            return
        self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
        self._grow(size)

    def _grow(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]

    def _count_collective(self, name: str, args: Any) -> None:
        kind = COLLECTIVES.get(name)
        if kind is None:
            return
        message = args[0] if kind in FIRST_ARGUMENT else args[1]
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(message))
        self.collectives[kind].calls += 1
        self.collectives[kind].bytes += size
        self.messages.append((kind, size))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
