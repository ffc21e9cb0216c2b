"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) for both objectives.

Legend: B images, C channels, H, W height and width, G guided channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.samplers import ModelFn

GuideChannels = int | Literal["all"]


def check_guidance(cfg_scale: float, guide_channels: GuideChannels, config: Config) -> None:
    """Check that guidance settings are valid for a model.

    Args:
        cfg_scale: guidance scale; 1 disables guidance.
        guide_channels: guided channels of a DDPM model.
        config: the model's configuration.

    Raises:
        ConfigError: the model was trained without label dropout, or has fewer channels.
    """
    channels = config.model.in_channels
    if cfg_scale != 1 and config.model.label_dropout == 0:
        raise ConfigError(
            "the guidance scale (sample.cfg_scale or --cfg-scale) must be 1 for a model trained with "
            f"model.label_dropout 0, got {cfg_scale}."
        )
    if guide_channels != "all" and not 1 <= guide_channels <= channels:
        raise ConfigError(f"--guide-channels must be all or a number from 1 to {channels}, got {guide_channels}.")


def guided(
    forward: Callable[[Tensor, Tensor, Any], Tensor],
    cond: Any,
    null_cond: Any,
    scale: float,
    kind: str,
    channels: int,
    guide_channels: GuideChannels = 3,
    one_batch: bool = False,
) -> ModelFn:
    """Return a ``model_fn`` for the samplers that includes guidance.

    - ``scale`` 1: one forward pass with ``cond``.
    - flow: ``v_null + scale * (v_cond - v_null)``, by two forward passes as in the reference, so with routing over a
      batch pool conditional and unconditional tokens compete only among themselves.
    - ddpm: one forward pass over [cond; null], as in the reference, in which they compete with each other. Only the
      first ``guide_channels`` noise channels are guided; the others, and the variance, are the conditional ones.

    Args:
        forward: the model, called as ``forward(x_BCHW, t_B, cond)``.
        cond: the condition: a tensor [B, ...], or a tuple or mapping of them.
        null_cond: the null condition, with the same structure; unused if ``scale`` is 1.
        scale: guidance scale.
        kind: the objective, ``flow`` or ``ddpm``.
        channels: C.
        guide_channels: guided noise channels under ``ddpm``; 3 is DiT's published setting, "all" guides all C.
        one_batch: under ``flow``, use one pass over [cond; null], which gives the same where images do not compete.
    """
    assert kind in ("flow", "ddpm"), f"unknown objective {kind!r}"
    if scale == 1:
        return lambda x, t_B: forward(x, t_B, cond)
    both = _concatenate(cond, null_cond) if one_batch or kind == "ddpm" else None
    G = channels if guide_channels == "all" else min(guide_channels, channels)

    def halves(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        if both is None:
            return forward(x, t_B, cond), forward(x, t_B, null_cond)
        out = forward(torch.cat([x, x]), torch.cat([t_B, t_B]), both)
        return out[: len(x)], out[len(x) :]

    def flow_fn(x: Tensor, t_B: Tensor) -> Tensor:
        v_cond, v_null = halves(x, t_B)
        return v_null + scale * (v_cond - v_null)

    def ddpm_fn(x: Tensor, t_B: Tensor) -> Tensor:
        from_cond, from_null = halves(x, t_B)
        noise = from_null[:, :G] + scale * (from_cond[:, :G] - from_null[:, :G])
        return torch.cat([noise, from_cond[:, G:]], dim=1)

    return flow_fn if kind == "flow" else ddpm_fn


def _concatenate(cond: Any, null_cond: Any) -> Any:
    """Join two conditions of equal structure along the batch."""
    if isinstance(cond, Tensor):
        return torch.cat([cond, null_cond])
    if isinstance(cond, Mapping):
        return {name: _concatenate(cond[name], null_cond[name]) for name in cond}
    return tuple(_concatenate(*pair) for pair in zip(cond, null_cond, strict=True))
