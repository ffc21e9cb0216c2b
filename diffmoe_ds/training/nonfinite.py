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
        behind = NOTHING
        for number, largest in enumerate(reversed(self._largest)):  # backward order: nearest to the loss first
            if largest is not None and not largest.isfinite():
                behind = number
                break
        first = _first(behind, rank, device)
        if first is None:
            return "in the sum over the ranks"
        behind, rank = first
        return f"on rank {rank}, first in the gradient of {self._names[-1 - behind]}"


@torch.no_grad()
def blame_forward(engine: DeepSpeedEngine, inputs: tuple[Tensor, ...], rank: int) -> str | None:
    """Rank and layer whose output is the first non-finite one, in words; none if all are finite.

    Every rank must call.

    Args:
        engine: in training mode; it runs once more.
        inputs: of the forward pass on this rank.
        rank: this one.
    """
    fired: list[str] = []  # layers in the order of computing, which is the same on all ranks
    place = NOTHING if all(tensor.isfinite().all() for tensor in inputs) else 0

    def look(name: str, module: nn.Module, _: object, output: object) -> None:
        nonlocal place
        fired.append(name)
        tensor = output[0] if isinstance(output, tuple) else output
        if place == NOTHING and isinstance(tensor, Tensor) and not tensor.isfinite().all():
            place = len(fired)

    handles = [m.register_forward_hook(partial(look, name)) for name, m in engine.module.named_modules()]
    engine(*inputs)
    for handle in handles:
        handle.remove()
    first = _first(place, rank, inputs[0].device)
    if first is None:
        return None
    place, rank = first
    return f"on rank {rank}, first in {'the images it read' if place == 0 else fired[place - 1] or 'the prediction'}"


def _first(place: int, rank: int, device: torch.device) -> tuple[int, int] | None:
    """(place, rank) of the lowest place over all ranks, of the lowest rank if several share it; none if all have none.

    Experts carry what one rank computed to the others, so the place counts before the rank.
    """
    world = dist.get_world_size()
    lowest = torch.tensor(place if place == NOTHING else place * world + rank, dtype=torch.int64, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return None if int(lowest) == NOTHING else divmod(int(lowest), world)
