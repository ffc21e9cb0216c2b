"""The threshold of each ``expert_race`` layer, from which on an expert takes a token in inference.

tau <- decay * tau + (1 - decay) * (K-th largest score of the pool), once per optimizer step and outside the forward
pass. The selection has found the score, so nothing is sent.

Source: Expert Race (arXiv 2503.16057).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from diffmoe_ds.moe.layer import MoELayer, Routing
from diffmoe_ds.moe.observed import Observed


class RaceThresholds(Observed):
    """Updates the thresholds of all layers of a model from fp32 [L], the K-th largest score in each."""

    def __init__(self, layers: Iterable[MoELayer], decay: float) -> None:
        """Collect the layers.

        Args:
            layers: all MoE layers of a model, in the order of its blocks (``model.moe_layers().values()``).
            decay: ``routing.threshold_decay``.
        """
        super().__init__()
        self._layers = [layer for layer in layers if layer.kind == "expert_race"]
        self._decay = decay

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Keep the scores of one micro-batch."""
        scores = [routing.race_score for routing in routings if routing.race_score is not None]
        if scores:
            self._observed.append(torch.stack(scores))

    @torch.no_grad()
    def update(self) -> None:
        """Move the thresholds towards the mean score of the micro-batches since the last update."""
        if not self._observed:
            return
        for layer, score in zip(self._layers, torch.stack(self._observed).mean(0), strict=True):
            layer.race_threshold.lerp_(score, 1 - self._decay)
        self._observed.clear()
