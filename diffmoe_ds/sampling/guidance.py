"""Guidance for both objectives, away from the unconditional prediction or that of a weaker model.

Sources: classifier-free guidance (Ho and Salimans, arXiv 2207.12598), guidance in an interval of noise levels
(Kynkäänniemi et al., 2404.07724), autoguidance (Karras et al., 2406.02507).

Legend: B images, C channels, H, W height and width, G guided channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.fields import IntervalField, ModelFn

GuideChannels = int | Literal["all"]
Interval = tuple[float, float]
"""Lowest and highest noise level, from 0 (clean) to 1 (noise), at which guidance is applied."""
Forward = Callable[[Tensor, Tensor, Any], Tensor]
"""(x_BCHW, t_B, condition) -> prediction."""
Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_BCHW, t_B) -> the prediction to guide, and the one that it is guided away from."""

DDPM_GUIDED = 3
"""Channels that DiT and the reference code guide in DDPM models."""


def check_guidance(
    cfg_scale: float, guide_channels: GuideChannels | None, config: Config, is_autoguided: bool = False
) -> None:
    """Check that guidance settings are valid for a model.

    Args:
        cfg_scale: guidance scale; 1 disables guidance.
        guide_channels: guided channels; None is the objective's default.
        config: the model's configuration.
        is_autoguided: whether a guiding model replaces the unconditional prediction.

    Raises:
        ConfigError: the model was trained without label dropout, or has fewer channels.
    """
    channels = config.model.in_channels
    if cfg_scale != 1 and config.model.label_dropout == 0 and not is_autoguided:
        raise ConfigError(
            "the guidance scale (sample.cfg_scale or --cfg-scale) must be 1 for a model trained with "
            f"model.label_dropout 0, got {cfg_scale}."
        )
    if isinstance(guide_channels, int) and not 1 <= guide_channels <= channels:
        raise ConfigError(f"--guide-channels must be all or a number from 1 to {channels}, got {guide_channels}.")


def check_scale_is_used(cfg_scale: float, interval: Interval | None, autoguidance: str | None) -> None:
    """Check the interval's bounds, and that guidance options are not set while guidance is disabled.

    Raises:
        ConfigError: the guidance scale is 1, or the interval is empty or exceeds [0, 1].
    """
    for option, value in (("--guidance-interval", interval), ("--autoguidance", autoguidance)):
        if value is not None and cfg_scale == 1:
            raise ConfigError(f"{option} needs guidance; set --cfg-scale to a value other than 1.")
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:  # also false for NaN
        low, high = interval
        raise ConfigError(f"--guidance-interval must be two numbers with 0 <= LOW < HIGH <= 1, got {low} {high}.")


def check_guide(guide: Config, config: Config, where: str) -> None:
    """Check that one model can guide another: both must have the same inputs and prediction target.

    Args:
        guide: configuration of the guiding model.
        config: configuration of the guided model.
        where: the guiding model's name in messages.

    Raises:
        ConfigError: a key differs; the message names the first one and both values.
    """
    for key, theirs, ours in (
        ("objective.kind", guide.objective.kind, config.objective.kind),
        ("model.in_channels", guide.model.in_channels, config.model.in_channels),
        ("model.input_size", guide.model.input_size, config.model.input_size),
        ("model.conditioning", guide.size.conditioning, config.size.conditioning),
        ("model.num_classes", guide.model.num_classes, config.model.num_classes),
        ("model.text_encoders", guide.model.text_encoders, config.model.text_encoders),
    ):
        if theirs != ours:
            raise ConfigError(f"{where}: {key} must be {ours!r} as in the guided model, got {theirs!r}.")


def guided_channels(kind: str, guide_channels: GuideChannels | None, channels: int) -> int:
    """Return the number of guided channels G.

    Args:
        kind: the objective, ``flow`` or ``ddpm``.
        guide_channels: a number, "all", or None for the objective's default: all for flow, 3 for DDPM.
        channels: C.
    """
    if guide_channels is None:
        guide_channels = DDPM_GUIDED if kind == "ddpm" else "all"
    return channels if guide_channels == "all" else min(guide_channels, channels)


def guided(
    forward: Forward,
    cond: Any,
    null_cond: Any,
    scale: float,
    kind: str,
    channels: int,
    guide_channels: GuideChannels | None = None,
    one_batch: bool = False,
) -> ModelFn:
    """Return a ``model_fn`` for the samplers that includes classifier-free guidance.

    - ``scale`` 1: one forward pass with ``cond``.
    - flow: two forward passes as in the reference, so with routing over a batch pool conditional and unconditional
      tokens compete only among themselves.
    - ddpm: one forward pass over [cond; null], as in the reference, in which they compete with each other.

    Args:
        forward: the model.
        cond: the condition: a tensor [B, ...], or a tuple or mapping of them.
        null_cond: the null condition, with the same structure; unused if ``scale`` is 1.
        scale: guidance scale.
        kind: the objective, ``flow`` or ``ddpm``.
        channels: C.
        guide_channels: see `guided_channels`.
        one_batch: under ``flow``, use one pass over [cond; null], which gives the same result if images do not compete.
    """
    assert kind in ("flow", "ddpm"), f"unknown objective {kind!r}"
    if scale == 1:
        return lambda x, t_B: forward(x, t_B, cond)
    pair = _two_labels(forward, cond, null_cond, one_batch or kind == "ddpm")
    return _extrapolate(pair, scale, guided_channels(kind, guide_channels, channels))


def guide_by_model(
    forwards: tuple[Forward, Forward],
    cond: Any,
    scale: float,
    kind: str,
    channels: int,
    guide_channels: GuideChannels | None = None,
) -> ModelFn:
    """Return a ``model_fn`` for the samplers that includes autoguidance: both models get the condition.

    Args:
        forwards: the guided and the guiding model.
        cond: the condition.
        scale: guidance scale.
        kind: the objective, ``flow`` or ``ddpm``.
        channels: C.
        guide_channels: see `guided_channels`.
    """
    strong, weak = forwards

    def pair(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return strong(x, t_B, cond), weak(x, t_B, cond)

    return _extrapolate(pair, scale, guided_channels(kind, guide_channels, channels))


def _extrapolate(pair: Pair, scale: float, G: int) -> ModelFn:
    """Return ``away + scale * (toward - away)`` for the first G channels, and ``toward`` for all others.

    Under DDPM, the other channels include the variance.

    Args:
        pair: returns (toward, away).
        scale: guidance scale.
        G: number of guided channels.
    """

    def model_fn(x: Tensor, t_B: Tensor) -> Tensor:
        toward, away = pair(x, t_B)
        guided_BGHW = away[:, :G] + scale * (toward[:, :G] - away[:, :G])
        return torch.cat([guided_BGHW, toward[:, G:]], dim=1) if toward.shape[1] > G else guided_BGHW

    return model_fn


def in_interval(guided_fn: ModelFn, plain_fn: ModelFn, interval: Interval | None) -> ModelFn | IntervalField:
    """Return a model function that is guided only at noise levels in an interval; None guides at all of them."""
    return guided_fn if interval is None else IntervalField(guided_fn, plain_fn, *interval)


def _two_labels(forward: Forward, cond: Any, null_cond: Any, one_batch: bool) -> Pair:
    """Return the predictions with a condition and with the null condition."""
    if not one_batch:
        return lambda x, t_B: (forward(x, t_B, cond), forward(x, t_B, null_cond))
    both = _concatenate(cond, null_cond)

    def pair(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(torch.cat([x, x]), torch.cat([t_B, t_B]), both)
        return out[: len(x)], out[len(x) :]

    return pair


def _concatenate(cond: Any, null_cond: Any) -> Any:
    """Join two conditions of equal structure along the batch."""
    if isinstance(cond, Tensor):
        return torch.cat([cond, null_cond])
    if isinstance(cond, Mapping):
        return {name: _concatenate(cond[name], null_cond[name]) for name in cond}
    return tuple(_concatenate(*pair) for pair in zip(cond, null_cond, strict=True))
