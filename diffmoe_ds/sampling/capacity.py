"""The compute dial: choose how many experts a token takes on average, after training.

The capacity predictor's thresholds decide how many experts a token takes. `calibrate` finds the thresholds at which
every expert takes its share c / E of all tokens of all sampler steps. Thresholds change the trajectories, and with them
the predicted probabilities, so it generates the calibration images again until they have the capacity c.

Legend: B images of a batch, T tokens of a forward pass, L MoE layers, E experts, N bins.
Source: DiffMoE (arXiv 2503.14487) varies one threshold for all experts; thresholds per layer and expert are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT, DiTOutput
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.observer import CapacityMeter, Counter, capacities

IMAGES = 64
"""Calibration images. Their seeds are the last ones of all, `2**64 - 64` and up, and their classes evenly spaced."""
BATCH = 16
"""Calibration images of a batch, at most."""
ROUNDS = 8
"""The most times that the calibration images are generated."""
TOLERANCE = 0.01
"""Largest relative error of the capacity of the calibration images that ends the search."""
LOGIT_RANGE = 32.0
"""Logits are counted in bins between minus and plus this; fp32 probabilities round to 1 above 17."""
BINS_PER_UNIT = 256
"""The bins are so narrow that the probability changes by less than 0.4% within one; thresholds are interpolated."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and the capacity that they give."""

    capacity: float
    """The capacity that was asked for."""
    threshold_LE: Tensor | None
    """fp32 on the CPU; None where the rule needs no thresholds."""
    measured: float
    """The capacity of the calibration images at these thresholds."""
    rounds: int
    """How many times they were generated."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that calibrate together."""

    rank: int = 0
    """This rank."""
    size: int = 1
    """Number of ranks."""
    sum: Callable[[Tensor], Tensor] = lambda counts: counts
    """Returns the sum of an int64 tensor on the CPU over the ranks."""


def check_capacity(capacity: float, routing: str, config: Config, option: str = "--capacity") -> None:
    """Check that a model can have a capacity.

    Args:
        capacity: c, the average number of experts per token.
        routing: the inference rule.
        config: of the model.
        option: name of the setting, for messages.

    Raises:
        ConfigError: it cannot.
    """
    E, S = config.num_experts, config.tokens_per_image
    if config.routing.kind == "dense" or E == 1:
        raise ConfigError(f"{option} needs a model with experts, and this one is dense; omit it.")
    if not 0 < capacity <= E:
        raise ConfigError(f"{option} must be above 0 and at most {E}, the number of experts, got {capacity:g}.")
    if config.routing.kind == "token_choice" and capacity != int(capacity):
        raise ConfigError(
            f"{option} must be an integer from 1 to {E} for a token_choice model, whose tokens all take the same "
            f"number of experts, got {capacity:g}."
        )
    if config.routing.kind != "token_choice" and routing == "static" and capacity * S < E:
        raise ConfigError(
            f"{option} must be at least {E / S:g} with --routing static, so that each of {E} experts takes one of the "
            f"{S} tokens of an image, got {capacity:g}."
        )


def calibrate(
    model: DiT,
    settings: SamplingSettings,
    capacity: float,
    batch_size: int = BATCH,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Calibration:
    """Find the thresholds at which tokens take a given number of experts on average.

    The result depends neither on the number of ranks nor on the batch size, apart from rounding and from rules by which
    the images of a batch compete. Every rank must call this.

    Args:
        model: in eval mode, with its inference rule set; it is left unchanged.
        settings: sampler and guidance, which the thresholds belong to.
        capacity: c, checked by `check_capacity`.
        batch_size: largest number of images that a rank generates at once; more than 16 has the effect of 16.
        ranks: share the calibration images; None for this process alone.
        progress: called after every sampler step with (steps done, steps at most).

    Returns:
        The calibration, the same on every rank; `apply` sets it.
    """
    layers = list(model.moe_layers().values())
    if layers[0].capacity_predictor is None or layers[0].inference == "static":
        return Calibration(capacity, None, capacity, 0)
    if capacity == layers[0].num_experts:
        return Calibration(capacity, torch.full((len(layers), layers[0].num_experts), -1.0), capacity, 0)
    found: Calibration | None = None
    with _unchanged(model):
        for round in range(ROUNDS):
            measured, histogram_LEN = _generate_round(model, settings, min(batch_size, BATCH), ranks or Ranks())
            if round > 0:
                now = Calibration(capacity, threshold_LE, measured, round + 1)
                print(round, measured)
                if found is None or abs(measured - capacity) < abs(found.measured - capacity):
                    found = now
                if abs(measured - capacity) <= TOLERANCE * capacity:
                    break
            threshold_LE = quantile(histogram_LEN, capacity / layers[0].num_experts)
            apply(model, Calibration(capacity, threshold_LE, measured, 0))
    assert found is not None
    return found


def _generate_round(model, settings, batch_size, ranks):
    device = model.pos_embed.device
    meter, histogram = CapacityMeter(model), Histogram(model)
    starts = range(0, IMAGES, batch_size)
    for start in starts:
        index = torch.arange(start, min(start + batch_size, IMAGES))
        label = index * 7 % IMAGES * model.config.model.num_classes // IMAGES
        both = Both(meter, histogram)
        generate(model, label.to(device), [2**64 - IMAGES + int(i) for i in index], settings, None, both)
    return float(capacities(meter.counts).mean()), histogram.counts.cpu()


class Both:
    def __init__(self, *observers):
        self.o = observers
    def start(self):
        for o in self.o: o.start()
    def keep(self):
        for o in self.o: o.keep()
    def observe(self, *a):
        for o in self.o: o.observe(*a)


class Histogram(Counter):
    """Counts the capacity predictor's logits in bins."""

    def __init__(self, model: DiT) -> None:
        layers = list(model.moe_layers().values())
        bins = int(2 * LOGIT_RANGE * BINS_PER_UNIT)
        super().__init__((len(layers), layers[0].num_experts, bins), model.pos_embed.device)

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        for counts_EN, routing in zip(self.pending, output.routing, strict=True):
            assert routing.capacity_logits_TE is not None
            E, N = counts_EN.shape
            logits_TE = routing.capacity_logits_TE.float().nan_to_num(nan=-LOGIT_RANGE)
            bin_TE = ((logits_TE + LOGIT_RANGE) * BINS_PER_UNIT).clamp(0, N - 1).long()
            first_E = torch.arange(E, device=bin_TE.device) * N
            index = (bin_TE + first_E).flatten()
            counts_EN.view(-1).index_add_(0, index, torch.ones_like(index))


def quantile(histogram_LEN: Tensor, fraction: float) -> Tensor:
    """Return the probability that a fraction of the tokens exceeds, fp32 [L, E]; interpolated within a bin."""
    above_LEN = histogram_LEN.flip(2).cumsum(2).double()  # tokens in the highest 1, 2, ... bins
    total = above_LEN[..., -1:]
    target = fraction * total
    index = torch.searchsorted(above_LEN, target).clamp(max=above_LEN.shape[2] - 1)
    upto = above_LEN.gather(2, index)
    inside = histogram_LEN.flip(2).gather(2, index).double().clamp(min=1)
    part = ((target - (upto - inside)) / inside).clamp(0, 1)
    logit = LOGIT_RANGE - (index + part) / BINS_PER_UNIT
    return logit.squeeze(2).sigmoid().float()


def apply(model: DiT, calibration: Calibration) -> None:
    for layer, threshold_E in zip(model.moe_layers().values(), calibration.threshold_LE, strict=True):
        layer.capacity = calibration.capacity
        layer.expert_threshold.copy_(threshold_E)


@contextmanager
def _unchanged(model: DiT) -> Iterator[None]:
    layers = list(model.moe_layers().values())
    before = [(layer.capacity, layer.expert_threshold.clone()) for layer in layers]
    try:
        yield
    finally:
        for layer, (c, t) in zip(layers, before):
            layer.capacity = c
            layer.expert_threshold.copy_(t)
