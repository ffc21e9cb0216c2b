"""Count the tokens that experts take while images are generated, without synchronizing with the device.

Legend: B images and T tokens of a forward pass, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from diffmoe_ds.model.dit import DiT, DiTOutput, Observer

AnyObserver = TypeVar("AnyObserver", bound=Observer)


@contextmanager
def observing(model: DiT, observer: AnyObserver) -> Iterator[AnyObserver]:
    """Attach an observer to a model for the forward passes of `generate` within the context."""
    before, model.observer = model.observer, observer
    try:
        yield observer
    finally:
        model.observer = before


class CapacityMeter:
    """Counts how many tokens each expert takes (an `Observer`); conditional and unconditional passes both count."""

    def __init__(self, model: DiT) -> None:
        """Start at zero.

        Args:
            model: with or without experts.
        """
        layers = model.moe_layers().values()
        shape = len(layers), model.config.num_experts + 1
        self.counts = torch.zeros(shape, dtype=torch.int64, device=model.pos_embed.device)
        """int64 [L, E + 1]: tokens taken by each expert, then all tokens of the layer; can be summed over ranks."""
        self._pending = torch.zeros_like(self.counts)

    def start(self) -> None:
        """Start a batch; see `Observer.start`."""
        self._pending.zero_()

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        """Add the tokens of a forward pass; see `Observer.observe`."""
        if output.routing:
            self._pending[:, :-1] += torch.stack([routing.mask_TE.sum(0) for routing in output.routing])
            self._pending[:, -1] += len(output.routing[0].mask_TE)

    def keep(self) -> None:
        """End a batch; see `Observer.keep`."""
        self.counts += self._pending

    def take(self) -> Tensor:
        """Return the counts on the CPU and start again at zero."""
        counts = self.counts.to("cpu", copy=True)
        self.counts.zero_()
        return counts


def capacities(counts: Tensor) -> Tensor:
    """Return the average number of experts per token in each layer, fp64 [L] on the CPU.

    Args:
        counts: of a `CapacityMeter`, or their sum over ranks.
    """
    counts = counts.cpu().double()
    return counts[:, :-1].sum(1) / counts[:, -1]
