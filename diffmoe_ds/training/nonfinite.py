"""Where a NaN or an infinity came from: which rank, which layer.

Nothing watches a healthy step.  When a step fails, its micro-batches run once more, with unchanged weights, and every
layer's output or every parameter's gradient is checked.  All ranks take part, because the passes hold collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.training.loss import forward, model_inputs
from diffmoe_ds.training.setup import Run

NOWHERE = torch.iinfo(torch.int64).max


class _OutputCheck:
    """Forward hooks that note the first layer whose output is not finite."""

    def __init__(self, model: nn.Module, is_input_finite: bool) -> None:
        self.layers: list[str] = []
        """Layers in the order of computing, which is the same on all ranks."""
        self.place = NOWHERE if is_input_finite else 0
        """How many layers had run; 0 means that the inputs were not finite."""
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
    """Return the rank and layer whose output is the first non-finite one, in words.  Every rank must call."""
    for batch in micro_batches:
        inputs = model_inputs(run, batch)
        check = _OutputCheck(run.model, all(bool(tensor.isfinite().all()) for tensor in inputs))
        run.engine(*inputs)
        check.remove()
        first = _first(check.place, run)
        if first is not None:
            place, rank = first
            what = "the images it read" if place == 0 else check.layers[place - 1] or "the prediction"
            return f"on rank {rank}, first in {what}"
    return "in the loss itself, not in any layer"


def locate_in_backward(run: Run, micro_batches: Sequence[MicroBatch]) -> str:
    """Return the rank and parameter of the first non-finite gradient, in words.  Every rank must call.

    The gradients are asked for by `torch.autograd.grad`, which neither accumulates nor reduces them, so the engine's
    state stays as it is.
    """
    named = [(name, parameter) for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    for batch in micro_batches:
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

    Experts carry what one rank computed to the others, so the place counts before the rank.
    """
    world = run.topology.world
    mine = place if place == NOWHERE else place * world + run.topology.rank
    lowest = int(all_reduce(torch.tensor(mine, dtype=torch.int64, device=run.device), "min"))
    return None if lowest == NOWHERE else divmod(lowest, world)
