"""Locate the rank and layer where a NaN or Inf first appears.

Finite steps pay nothing for this.  After a non-finite step, its micro-batches are rerun with unchanged weights, and
every layer's output or every parameter's gradient is checked.  All ranks take part because the passes call collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.moe.layer import exact_dispatch
from diffmoe_ds.training.loss import forward, model_inputs
from diffmoe_ds.training.setup import Run

NOWHERE = torch.iinfo(torch.int64).max


class _OutputCheck:
    """Forward hooks that record the first layer with a non-finite output."""

    def __init__(self, model: nn.Module, is_input_finite: bool) -> None:
        self.layers: list[str] = []
        """Layers in execution order, which is the same on all ranks."""
        self.place = NOWHERE if is_input_finite else 0
        """1-based index of the first non-finite layer; 0 for non-finite inputs, `NOWHERE` if all were finite."""
        self._handles = [m.register_forward_hook(partial(self._check, name)) for name, m in model.named_modules()]

    def _check(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        self.layers.append(name)
        tensor = output[0] if isinstance(output, tuple) else output
        if self.place == NOWHERE and isinstance(tensor, Tensor) and not tensor.isfinite().all():
            self.place = len(self.layers)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def locate_in_forward(run: Run, micro_batches: Sequence[MicroBatch]) -> str:
    """Describe the rank and layer of the first non-finite output.  Every rank must call this."""
    for batch in micro_batches:
        inputs = model_inputs(run, batch)
        check = _OutputCheck(run.model, all(bool(tensor.isfinite().all()) for tensor in inputs))
        exact = exact_dispatch(run.model.moe_layers().values())
        with exact, torch.compiler.set_stance("force_eager"):  # compiled blocks skip hooks
            run.engine(*inputs)
        check.remove()
        first = _first(check.place, run)
        if first is not None:
            place, rank = first
            what = "its input images" if place == 0 else check.layers[place - 1] or "the prediction"
            return f"on rank {rank}, first in {what}"
    return "in the loss itself, not in any layer"


def locate_in_backward(run: Run, micro_batches: Sequence[MicroBatch]) -> str:
    """Describe the rank and parameter of the first non-finite gradient.  Every rank must call this.

    Uses `torch.autograd.grad`, which neither accumulates nor reduces gradients, so the engine's state is unchanged.
    """
    named = [(name, parameter) for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    for batch in micro_batches:
        with exact_dispatch(run.model.moe_layers().values()):
            _, losses, _ = forward(run, run.model, batch)
        gradients = torch.autograd.grad(losses.total, [parameter for _, parameter in named], allow_unused=True)
        place = NOWHERE
        for behind, gradient in enumerate(reversed(gradients)):  # backward order: nearest to the loss first
            if gradient is not None and not gradient.isfinite().all():
                place = behind
                break
        first = _first(place, run)
        if first is not None:
            place, rank = first
            return f"on rank {rank}, first in the gradient of {named[-1 - place][0]}"
    return "in the sum over the ranks"


def _first(place: int, run: Run) -> tuple[int, int] | None:
    """Return the (place, rank) of the lowest place over all ranks, or None if no rank found one.

    Non-finite values spread to other ranks through the experts, so the earliest layer decides, then the lowest rank.
    """
    world = run.topology.world
    mine = place if place == NOWHERE else place * world + run.topology.rank
    lowest = int(all_reduce(torch.tensor(mine, dtype=torch.int64, device=run.device), "min"))
    return None if lowest == NOWHERE else divmod(lowest, world)
