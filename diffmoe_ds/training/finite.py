"""Where a NaN or an infinity came from: which rank, which layer."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from diffmoe_ds.model.dit import DiT

NOTHING = torch.iinfo(torch.int64).max


class GradientWatch:
    """Notes for every parameter whether its gradient on this rank was finite; costs one reduction each, no wait."""

    def __init__(self, model: DiT) -> None:
        """To be made after DeepSpeed's engine, which replaces the storage of parameters."""
        self._names: list[str] = []
        self._largest: list[Tensor | None] = []
        for index, (name, parameter) in enumerate(model.named_parameters()):
            self._names.append(name)
            self._largest.append(None)
            parameter.register_hook(partial(self._note, index))

    @torch.no_grad()
    def _note(self, index: int, gradient: Tensor) -> None:
        largest, before = torch.linalg.vector_norm(gradient, ord=float("inf")), self._largest[index]
        self._largest[index] = largest if before is None else torch.maximum(before, largest)

    def forget(self) -> None:
        """A step is over."""
        self._largest = [None] * len(self._names)

    def blame(self, rank: int, device: torch.device) -> str:
        """Rank and parameter of the first non-finite gradient, in words; every rank must call."""
        mine = NOTHING
        for index in reversed(range(len(self._names))):  # backward order: nearest to the loss first
            largest = self._largest[index]
            if largest is not None and not largest.isfinite():
                mine = rank * len(self._names) + len(self._names) - 1 - index
                break
        first = _lowest(mine, device)
        if first == NOTHING:
            return "in the sum over the ranks"
        rank, behind = divmod(first, len(self._names))
        return f"on rank {rank}, first in the gradient of {self._names[len(self._names) - 1 - behind]}"


@torch.no_grad()
def blame_forward(engine: DeepSpeedEngine, inputs: tuple[Tensor, ...], rank: int) -> str | None:
    """Rank and layer whose output is the first non-finite one, in words; none if all are finite.

    Every rank must call.

    Args:
        engine: in training mode; it runs once more.
        inputs: of the forward pass on this rank.
        rank: this one.
    """
    names = [name for name, _ in engine.module.named_modules()]
    found: list[int] = []

    def look(index: int, module: nn.Module, _: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(tensor, Tensor) and not tensor.isfinite().all():
            found.append(index)

    mine = NOTHING
    if not all(tensor.isfinite().all() for tensor in inputs):
        mine = rank * (len(names) + 1)
    handles = [m.register_forward_hook(partial(look, i)) for i, (_, m) in enumerate(engine.module.named_modules())]
    engine(*inputs)
    for handle in handles:
        handle.remove()
    if mine == NOTHING and found:
        mine = rank * (len(names) + 1) + 1 + found[0]
    first = _lowest(mine, inputs[0].device)
    if first == NOTHING:
        return None
    rank, number = divmod(first, len(names) + 1)
    return f"on rank {rank}, first in {'the images it read' if number == 0 else names[number - 1] or 'the prediction'}"


def _lowest(value: int, device: torch.device) -> int:
    lowest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest)
