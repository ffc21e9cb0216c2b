"""The compute dial: set the average number of experts per token after training.

The capacity predictor's thresholds decide which experts take a token. `calibrate` finds the thresholds at which every
expert takes its share c / E of all tokens, over all sampler steps. Other thresholds change the images and therefore the
predictions: the calibration images are generated repeatedly until their capacity is c. The thresholds found are logits:
in fp32, probabilities near 1 are too coarse for a small c.

Legend: T tokens of a forward pass, L MoE layers, E experts, S tokens of an image, N bins.
Source: DiffMoE (arXiv 2503.14487) varies one threshold for all experts; here each layer and expert has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT, DiTOutput
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.observer import CapacityMeter, capacities, observing

IMAGES = 128
"""Number of calibration images; a power of two."""
FIRST_SEED = 2**64 - IMAGES
"""First seed of the calibration images, which use the highest seeds."""
BATCH = 16
"""Batch size for calibration, at most; a power of two. Up to `IMAGES / BATCH` ranks share the work."""
ROUNDS = 8
"""Maximum number of times that the calibration images are generated."""
TOLERANCE = 0.01
"""The search ends when the capacity of the calibration images is within this fraction of c."""
LOGIT_RANGE = 64
"""Logits are binned from minus to plus this."""
BINS_PER_UNIT = 128
"""Bins per unit of the logits; quantiles are interpolated within a bin."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds and the resulting capacity."""

    capacity: float
    """c, the requested average number of experts per token."""
    threshold_LE: Tensor | None
    """Logits, fp32 on the CPU; None if the routing rule does not use thresholds."""
    measured: float
    """The capacity of the calibration images with these thresholds."""
    rounds: int
    """How often the calibration images were generated."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that calibrate together."""

    rank: int
    """This rank."""
    size: int
    """Number of ranks."""
    sum: Callable[[Tensor], Tensor]
    """Returns the sum over the ranks of an int64 tensor on the CPU."""


ALONE = Ranks(0, 1, lambda counts: counts)
RoundProgress = Callable[[int, int, int], object]
"""(round from 1, sampler steps of this rank done in it, their total) -> anything."""


def check_capacity(capacity: float, routing: str, config: Config, option: str = "--capacity") -> None:
    """Check that a capacity is valid for a model.

    Args:
        capacity: c, the average number of experts per token.
        routing: the inference rule.
        config: of the model.
        option: name of the setting, for messages.

    Raises:
        ConfigError: it is not.
    """
    E, S, kind = config.num_experts, config.tokens_per_image, config.routing.kind
    if E == 1:
        raise ConfigError(f"{option} needs a model with experts; this model is dense.")
    if not 0 < capacity <= E:
        raise ConfigError(f"{option} must be positive and at most the number of experts, {E}, got {capacity:g}.")
    kept = config.experts_kept
    if kind == "token_choice" and capacity > kept:
        raise ConfigError(
            f"{option} must be at most {kept}, the experts in the groups that a token uses, got {capacity:g}."
        )
    if kind == "expert_race" and routing == "per_token":
        raise ConfigError(
            f"{option} needs static routing for an expert_race model, whose threshold is fixed by training; add "
            "--routing static."
        )
    if kind == "token_choice" and capacity != int(capacity):
        raise ConfigError(
            f"{option} must be an integer for a token_choice model, where every token takes the same number of "
            f"experts, got {capacity:g}."
        )
    if kind != "token_choice" and routing == "static" and capacity * S < E:
        raise ConfigError(
            f"{option} must be at least {E / S:g} with static routing, so that each of the {E} experts takes at "
            f"least one of the {S} tokens of an image, got {capacity:g}."
        )


def calibrate(
    model: DiT,
    settings: SamplingSettings,
    capacity: float,
    guide: DiT | None = None,
    batch_size: int = BATCH,
    ranks: Ranks = ALONE,
    progress: RoundProgress | None = None,
) -> Calibration:
    """Find the thresholds at which tokens take a given number of experts on average.

    The batches, and so the result, depend neither on the number of ranks nor, unless images compete, on
    ``batch_size``. Every rank must call this.

    Args:
        model: in eval mode, with its inference rule set; unchanged on return.
        settings: sampler and guidance, for which the thresholds are valid.
        capacity: c, valid for the model; see `check_capacity`.
        guide: the model of ``settings.autoguidance``.
        batch_size: images per batch in sampling; see `calibration_batch`.
        ranks: the ranks that share the calibration images.
        progress: called after every sampler step.

    Returns:
        The calibration, the same on every rank; `apply` sets it.
    """
    layers = list(model.moe_layers().values())
    E = layers[0].num_experts
    if not uses_thresholds(model):
        return Calibration(capacity, None, capacity, 0)
    if capacity == E:
        return Calibration(capacity, torch.full((len(layers), E), -torch.inf), capacity, 0)
    progress = progress or (lambda number, done, total: None)
    best: Calibration | None = None
    with unchanged(model):
        calibration_round = _Round(model, settings, guide, calibration_batch(model, batch_size), ranks)
        _, histogram_LEN = calibration_round.generate(partial(progress, 1))
        logit_LE = quantile_logits(histogram_LEN, capacity / E)
        for number in range(2, ROUNDS + 1):
            threshold_LE = logit_LE.float()
            apply(model, Calibration(capacity, threshold_LE, capacity, number))
            measured, histogram_LEN = calibration_round.generate(partial(progress, number))
            if best is None or abs(measured - capacity) < abs(best.measured - capacity):
                best = Calibration(capacity, threshold_LE, measured, number)
            if abs(measured - capacity) <= TOLERANCE * capacity:
                break
            # damped, because full steps may oscillate between two sets of thresholds
            logit_LE = (logit_LE + quantile_logits(histogram_LEN, capacity / E)) / 2
    assert best is not None, "there are at least two rounds"
    return replace(best, rounds=number)


def calibration_batch(model: DiT, batch_size: int) -> int:
    """Return the number of calibration images per batch, which is the same for every batch and rank.

    Args:
        model: with its inference rule set.
        batch_size: images per batch in sampling. It counts only where images compete, so that otherwise a run that is
            resumed with another batch size finds the same thresholds.
    """
    return 1 << min(batch_size, BATCH).bit_length() - 1 if model.images_compete else BATCH


def uses_thresholds(model: DiT) -> bool:
    """Return whether the capacity predictor's thresholds decide the capacity of a model, with its inference rule."""
    return any(
        layer.capacity_predictor is not None and layer.inference != "static" for layer in model.moe_layers().values()
    )


@torch.no_grad()
def apply(model: DiT, calibration: Calibration) -> None:
    """Set the capacity of a model in memory; its checkpoint is unchanged.

    Args:
        model: the model of the calibration.
        calibration: from `calibrate`.
    """
    for index, layer in enumerate(model.moe_layers().values()):
        layer.capacity = calibration.capacity  # for `static`, and the bound of `bounded_dispatch`
        if calibration.threshold_LE is not None:
            layer.logit_threshold_E = calibration.threshold_LE[index].to(layer.expert_threshold.device)


@contextmanager
def unchanged(model: DiT) -> Iterator[None]:
    """Restore the capacity and the thresholds on exit."""
    layers = list(model.moe_layers().values())
    before = [(layer.capacity, layer.logit_threshold_E) for layer in layers]
    try:
        yield
    finally:
        for layer, (capacity, threshold_E) in zip(layers, before, strict=True):
            layer.capacity = capacity
            layer.logit_threshold_E = threshold_E


@dataclass(frozen=True)
class _Round:
    """Generates the calibration images once, on all ranks."""

    model: DiT
    settings: SamplingSettings
    guide: DiT | None
    batch_size: int
    """Power of two: all batches of all ranks have this size."""
    ranks: Ranks

    def generate(self, progress: Callable[[int, int], object]) -> tuple[float, Tensor]:
        """Return the capacity, and the histogram of the logits, int64 [L, E, N] on the CPU."""
        census = Census(self.model)
        count = IMAGES // self.batch_size
        turns = range(self.ranks.rank, self.ranks.rank + count, self.ranks.size)
        for turn, index in enumerate(turns):
            # a rank without a batch of its own repeats one: ranks that share experts must run in lockstep
            observer = census if index < count else Census(self.model)
            images = range(index % count, IMAGES, count)

            def batch_progress(done: int, total: int, turn: int = turn) -> None:
                progress(turn * total + done, len(turns) * total)

            self._generate_batch(images, observer, batch_progress)
        counts, histogram_LEN = self.ranks.sum(census.counts.cpu()), self.ranks.sum(census.histogram_LEN.cpu())
        return float(capacities(counts).mean()), histogram_LEN

    def _generate_batch(self, images: Sequence[int], observer: Census, progress: Callable[[int, int], object]) -> None:
        count = self.model.y_embedder.num_labels
        label_B = torch.tensor([image * count // IMAGES for image in images])  # all labels, or evenly spaced ones
        seeds = [FIRST_SEED + image for image in images]
        with observing(self.model, observer):
            label_B = label_B.to(self.model.pos_embed.device)
            generate(self.model, label_B, seeds, self.settings, progress, self.guide)


class Census(CapacityMeter):
    """A `CapacityMeter` that also counts the capacity predictor's logits, in bins."""

    def __init__(self, model: DiT) -> None:
        """Start at zero; see `CapacityMeter`."""
        super().__init__(model)
        layers, experts = len(model.moe_layers()), model.config.num_experts
        shape = layers, experts, 2 * LOGIT_RANGE * BINS_PER_UNIT
        self.histogram_LEN = torch.zeros(shape, dtype=torch.int64, device=self.counts.device)
        """int64; the first and last bins include the logits beyond the range."""
        self._pending_LEN = torch.zeros_like(self.histogram_LEN)

    def start(self) -> None:
        """Start a batch; see `Observer.start`."""
        super().start()
        self._pending_LEN.zero_()

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        """Add the logits of a forward pass; see `Observer.observe`."""
        super().observe(t_B, y_B, output)
        for counts_EN, routing in zip(self._pending_LEN, output.routing, strict=True):
            assert routing.capacity_logits_TE is not None, "the rule uses thresholds"
            experts, bins = counts_EN.shape
            logits_TE = routing.capacity_logits_TE.float().nan_to_num(nan=-LOGIT_RANGE)  # no expert takes a NaN
            bin_TE = ((logits_TE + LOGIT_RANGE) * BINS_PER_UNIT).clamp(0, bins - 1).long()
            index = (bin_TE + bins * torch.arange(experts, device=bin_TE.device)).flatten()
            counts_EN.view(-1).index_add_(0, index, torch.ones_like(index))

    def keep(self) -> None:
        """End a batch; see `Observer.keep`."""
        super().keep()
        self.histogram_LEN += self._pending_LEN


def quantile_logits(histogram_LEN: Tensor, fraction: float) -> Tensor:
    """Return the logits exceeded by a fraction of the tokens, fp64 [L, E], interpolated linearly within a bin.

    Args:
        histogram_LEN: of a `Census`.
        fraction: between 0 and 1.
    """
    descending_LEN = histogram_LEN.flip(2).double()
    above_LEN = descending_LEN.cumsum(2)
    wanted_LE1 = fraction * above_LEN[..., -1:]
    bin_LE1 = torch.searchsorted(above_LEN, wanted_LE1)
    inside_LE1 = descending_LEN.gather(2, bin_LE1)
    part_LE1 = 1 - (above_LEN.gather(2, bin_LE1) - wanted_LE1) / inside_LE1
    return (LOGIT_RANGE - (bin_LE1 + part_LE1) / BINS_PER_UNIT).squeeze(2)
