"""The biases that balance the load of a ``token_choice`` router without a loss.

After each optimizer step, bias_e <- bias_e + rate * sign(mean load - load_e). The load is the number of tokens of all
ranks and micro-batches of the step that chose the expert; one message carries that of all layers.

Legend: L MoE layers, E experts.
Source: arXiv 2408.15664; DeepSeek-V3 (2412.19437), section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from diffmoe_ds.moe.layer import MoELayer, Routing
from diffmoe_ds.moe.observed import Observed
from diffmoe_ds.moe.search import Pool


class CorrectionBiases(Observed):
    """Updates the biases of all layers of a model from int64 [L, E], the tokens that experts took on this rank."""

    def __init__(self, layers: Iterable[MoELayer], rate: float | None, world: Pool) -> None:
        """Collect the layers.

        Args:
            layers: all MoE layers of a model, in the order of its blocks (``model.moe_layers().values()``).
            rate: ``routing.bias_rate``; nothing happens if it is None or 0.
            world: all ranks of the run.
        """
        super().__init__()
        self._layers = list(layers) if rate else []
        self._rate = rate
        self._world = world

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Count the tokens of one micro-batch."""
        if self._layers:
            self._observed.append(torch.stack([routing.mask_TE.sum(0) for routing in routings]))

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases by the load of the micro-batches since the last update. Every rank must call this."""
        if not self._observed:
            return
        load_LE = self._world.sum(torch.stack(self._observed).sum(0)).double()
        direction_LE = (load_LE.mean(dim=1, keepdim=True) - load_LE).sign().float()
        for layer, direction_E in zip(self._layers, direction_LE, strict=True):
            layer.correction_bias.add_(direction_E, alpha=self._rate)
        self._observed.clear()
