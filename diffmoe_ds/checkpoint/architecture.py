"""Which keys of the configuration decide whether the weights of one model fit another."""

from __future__ import annotations

from typing import Any

from diffmoe_ds.config.load import config_to_dict
from diffmoe_ds.config.schema import Config

FIXED = {
    "model": (
        "hidden_size", "depth", "num_heads", "input_size", "in_channels", "patch_size", "num_classes", "mlp_ratio",
        "mlp", "qk_norm", "norm", "positions", "text_encoders", "text_qk_norm",
    ),
    "routing": (
        "kind", "interleave", "dense_blocks", "expert_mlp", "expert_width", "shared_experts", "shared_width",
        "unconditional_expert", "affinity", "score", "router_input", "renormalize", "weight_scale",
        "capacity_predictor",
    ),
    "objective": ("kind", "flow_time_scale", "flow_direction"),
}  # fmt: skip
"""Keys that decide the shapes or the meaning of the weights, so they cannot change between save and resume."""
EXPERT_SHAPE = ("expert_mlp", "expert_width", "shared_experts", "shared_width")
"""Keys of `routing` that may differ if the experts are the same."""
PROJECTOR_KEYS = ("repa_hidden", "repa_features")
"""Keys of the section `loss` that decide the shapes of REPA's projector."""


def first_difference(saved: Config, wanted: Config, except_for: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """Return the first key in which two models differ, and its value in each; None if weights of one fit the other.

    Args:
        saved: the one model.
        wanted: the other one.
        except_for: keys of the model that may differ.
    """
    size = vars(saved.size)
    pairs: list[tuple[str, Any, Any]] = [("routing.num_experts", saved.num_experts, wanted.num_experts)]
    pairs += [(f"model.{key}", getattr(saved.size, key), getattr(wanted.size, key)) for key in size]
    was, now = config_to_dict(saved), config_to_dict(wanted)
    resolved = ("expert_mlp", "expert_hidden", "shared_hidden")
    same = all(getattr(saved, name) == getattr(wanted, name) for name in resolved)  # whichever keys say so
    pairs += [
        (f"{section}.{key}", was[section][key], now[section][key])
        for section, keys in FIXED.items()
        for key in keys
        if key not in size and key not in except_for and not (same and key in EXPERT_SHAPE)
    ]
    if saved.aligned_block is not None and wanted.aligned_block is not None:
        keys = [key for key in PROJECTOR_KEYS if key not in except_for]
        pairs += [(f"loss.{key}", was["loss"][key], now["loss"][key]) for key in keys]
    elif "repa_weight" not in except_for:
        pairs.append(("loss.repa_weight (zero or positive)", saved.loss.repa_weight, wanted.loss.repa_weight))
    if (saved.routing.bias_rate is None) != (wanted.routing.bias_rate is None):
        pairs.append(("routing.bias_rate (a number or unset)", saved.routing.bias_rate, wanted.routing.bias_rate))
    if bool(saved.routing.per_layer_weight) != bool(wanted.routing.per_layer_weight):
        weights = saved.routing.per_layer_weight, wanted.routing.per_layer_weight
        pairs.append(("routing.per_layer_weight (zero or positive)", *weights))
    if "label_dropout" not in except_for and has_null(saved) != has_null(wanted):
        dropout = saved.model.label_dropout, wanted.model.label_dropout
        pairs.append(("model.label_dropout (zero or positive)", *dropout))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def has_null(config: Config) -> bool:
    """Return whether a model has a null condition: that of a class model is a row of its embedding."""
    return config.is_text or config.model.label_dropout > 0
