"""Exponential moving average of the weights, sharded like the fp32 master weights."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.distributed.fragments import Fragment, Part
from diffmoe_ds.model.dit import DiT


class EMA:
    """Averages this rank's fragments in fp32: ema <- decay * ema + (1 - decay) * weights."""

    def __init__(self, fragments: list[Fragment], parts: dict[str, Part]) -> None:
        """Start from the current weights.

        Args:
            fragments: the pieces of the master weights that this rank keeps.
            parts: the part of every parameter that this rank computes with, by name.
        """
        self.fragments = fragments
        self.parts = parts
        self.values = [fragment.fp32.clone() for fragment in fragments]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Update the averages, after an optimizer step."""
        if self.values:
            torch._foreach_lerp_(self.values, [fragment.fp32 for fragment in self.fragments], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: DiT, trained: DiT) -> None:
        """Fill a model of the same layout with the averaged weights. Every rank must call this.

        Args:
            model: the target; its expert layers hold this rank's experts.
            trained: the model being averaged. Its thresholds are copied: they are already moving averages, and
                averaging them again from their initial 0 would bias early checkpoints.
        """
        pieces: dict[str, list[tuple[Fragment, Tensor]]] = defaultdict(list)
        for fragment, value in zip(self.fragments, self.values, strict=True):
            pieces[fragment.name].append((fragment, value))
        for name, parameter in model.named_parameters():
            flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            for fragment, value in pieces[name]:
                if fragment.is_owner:
                    flat.narrow(0, fragment.offset, value.numel()).copy_(value)
            all_reduce(flat, group=self.parts[name].group)
            parameter.copy_(flat.view_as(parameter))
        for target, source in zip(model.buffers(), trained.buffers(), strict=True):
            target.copy_(source)
