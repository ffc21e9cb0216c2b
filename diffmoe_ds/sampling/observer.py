"""Observe the routing of generated images, on the device: nothing here waits for it.

Legend: B images of a forward pass, T tokens of a forward pass, L MoE layers, E experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from diffmoe_ds.model.dit import DiT, DiTOutput


class Observer(Protocol):
    """Sees every forward pass of `generate`, which may have to repeat all steps of a batch."""

    def start(self) -> None:
        """Start a batch: forget what was observed since the last `keep`."""
        ...

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        """Observe one forward pass, without waiting for the device.

        Args:
            t_B: the times, as the model gets them.
            y_B: int64 labels; with guidance, those of unconditional passes are the null label.
            output: of the model, with the routing of each MoE layer.
        """
        ...

    def keep(self) -> None:
        """End a batch: what was observed since `start` is valid."""
        ...


class Counter:
    """An `Observer` that counts in one tensor; subclasses define `observe`, which adds to `pending`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        """Of all valid batches."""
        self.pending = torch.zeros_like(self.counts)
        """Of the current batch."""

    def start(self) -> None:
        """Start a batch; see `Observer.start`."""
        self.pending.zero_()

    def keep(self) -> None:
        """End a batch; see `Observer.keep`."""
        self.counts += self.pending


class CapacityMeter(Counter):
    """Counts how many tokens each expert takes; conditional and unconditional passes count as they happen."""

    def __init__(self, model: DiT) -> None:
        """Start at zero.

        Args:
            model: with or without experts.
        """
        layers = model.moe_layers().values()
        experts = max((layer.num_experts for layer in layers), default=0)
        super().__init__((len(layers), experts + 1), model.pos_embed.device)
        # int64 [L, E + 1]: tokens that each expert of a layer took, and tokens that passed the layer

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        """Add the tokens of a forward pass; see `Observer.observe`."""
        if output.routing:
            self.pending[:, :-1] += torch.stack([routing.mask_TE.sum(0) for routing in output.routing])
            self.pending[:, -1] += len(output.routing[0].mask_TE)


def capacities(counts: Tensor) -> Tensor:
    """Return the average number of experts per token in each layer, fp64 [L].

    Args:
        counts: of a `CapacityMeter`, or their sum over ranks.
    """
    counts = counts.double().cpu()
    return counts[:, :-1].sum(1) / counts[:, -1]
