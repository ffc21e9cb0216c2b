"""ProMoE's and DSMoE's published models: their configurations and the names of their weights.

Sources: ali-vilab/ProMoE at 5915b31 (arXiv 2510.24711) and yhlleo/EfficientMoE at cd7a27c (DSMoE, arXiv 2512.01252).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffmoe_ds.checkpoint.reference_weights import PATCHES, shape_of
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

ROUTER_KINDS = {"promoe": "token_choice", "promoe_ec": "expert_choice", "dsmoe": "token_choice"}
"""Model classes of the two repositories, and our routers. Weights do not tell the first two from each other."""
PROMOE_CLASSES = 1000
"""ProMoE's code takes this label for the null label, so with other classes its unconditional expert would be idle."""
PROMOE_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {"use_swiglu": (False, None), "num_classes": (PROMOE_CLASSES,)},
    "moe": {"use_uncond_expert": (True,), "load_balance_loss_coef": (0, None), "init_MoeMLP": (False, None)},
}
DSMOE_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "rope_type": ("2d",), "use_sinks": (False, None), "sliding_window": (0, None), "enable_gqa": (False, None),
        "norm_type": ("layernorm", "rmsnorm", None),
    },
    "moe": {"use_shared_expert": (True,), "init_MoeMLP": (False, None)},
}  # fmt: skip
"""Values that are supported of arguments which change the model; None stands for an argument that is not given."""
PROMOE_NAMES = {
    "gate_weight": "cluster_centers",
    "shared_experts.fc1": "shared_expert.up_proj",
    "shared_experts.fc2": "shared_expert.down_proj",
}
DSMOE_NAMES = {"gate_weight": "gate.weight", "correction_bias": "gate.e_score_correction_bias"}
"""Our names in a MoE layer, and theirs; a name of ours is a weight or the start of one."""
PUBLISHED_DSMOE = {16: (2, 2.0, 2), 48: (5, 2.5, 1)}
"""By number of experts: experts per token, scale of the weights, groups; see arXiv 2512.01252."""
DSMOE_INPUT = 32
"""Side of the latents of the published models, which their weights do not tell: 256 pixels."""
GELU_NAMES = {"w1": "up_proj.weight", "w2": "down_proj.weight"}
SWIGLU_NAMES = {"w1": "gate_proj.weight", "w2": "down_proj.weight", "w3": "up_proj.weight"}


def router_sections(kind: str, model: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys of our configuration in which a model differs from a dense flow model, by section.

    Args:
        kind: one of `ROUTER_KINDS`.
        model: the arguments of its class.
        moe: the arguments of its experts.

    Raises:
        ConfigError: an argument is missing or not supported.
    """
    fixed = DSMOE_FIXED if kind == "dsmoe" else PROMOE_FIXED
    for section, given in (("model", model), ("moe", moe)):
        for key, valid in fixed[section].items():
            value = given.get(key)
            if value not in valid:
                allowed = " or ".join(map(str, (choice for choice in valid if choice is not None)))
                raise ConfigError(f"{section}.{key}: only {allowed} is supported for {kind}, got {short_repr(value)}.")
    moe = {key: value for key, value in moe.items() if value is not None}
    try:
        return _dsmoe_sections(model, moe) if kind == "dsmoe" else _promoe_sections(kind, model, moe)
    except KeyError as missing:
        raise ConfigError(f"moe.{missing.args[0]}: missing in the configuration of a {kind} model.") from None


def _promoe_sections(kind: str, model: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    score, k = moe.get("router_weight_mode", "identity"), moe["top_k"]
    if kind == "promoe_ec" and score == "softmax":
        raise ConfigError("moe.router_weight_mode: softmax, over the tokens of an image, is not supported.")
    if kind == "promoe" and k != 1 and not moe.get("use_top_k_for_routing_contrastive", True):
        raise ConfigError("moe.use_top_k_for_routing_contrastive: false is not supported for top_k above 1.")
    return {
        "model": {"qk_norm": "layer" if model.get("qk_norm") else "none"},
        "routing": {
            "kind": ROUTER_KINDS[kind],
            "num_experts": moe["num_routed_experts"],
            "capacity": k,
            "expert_width": moe["moe_intermediate_size"],
            "shared_experts": 1 if moe.get("use_shared_expert", True) else 0,
            "shared_width": moe["shared_expert_intermediate_size"],
            "unconditional_expert": True,
            "affinity": "cosine",
            "score": score,
            "contrastive_weight": moe.get("routing_contrastive_lam", 0),
            "contrastive_temperature": moe.get("routing_contrastive_temperature", 0.07),
        },
        "objective": {
            "flow_time_scale": 1000, "flow_direction": "data_to_noise", "time_distribution": "logit_normal",
        },
    }  # fmt: skip


def _dsmoe_sections(model: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    first = moe.get("skip_first2", False)
    if not isinstance(first, int) or first < 0:
        raise ConfigError(f"moe.skip_first2: must be true, false or a number of blocks, got {short_repr(first)}.")
    return {
        "model": {
            "mlp": "silu",
            "norm": "rms" if model.get("norm_type") == "rmsnorm" else "layer",
            "positions": "rope",
        },
        "routing": {
            "kind": ROUTER_KINDS["dsmoe"],
            "num_experts": moe["num_experts"],
            "capacity": moe["num_experts_per_tok"],
            "dense_blocks": 2 if first is True else int(first),
            "expert_mlp": "swiglu",
            "expert_width": moe["moe_intermediate_size"],
            "shared_experts": 1,
            "score": "sigmoid",
            "renormalize": True,
            "weight_scale": moe["routed_scaling_factor"],
            "groups": moe["n_group"],
            "groups_kept": moe["topk_group"],
            "bias_rate": 0,
        },
    }


def is_promoe(config: Config) -> bool:
    """Return whether the names of a model's weights are ProMoE's."""
    return config.routing.affinity == "cosine"


def is_dsmoe(config: Config) -> bool:
    """Return whether the names of a model's weights are DSMoE's."""
    return config.routing.bias_rate is not None and config.expert_mlp == "swiglu"


def router_views(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return views of one of our tensors under ProMoE's or DSMoE's names, one per expert of a stacked weight.

    Args:
        config: a configuration for which `is_promoe` or `is_dsmoe` holds.
        name: our tensor's name.
        tensor: the tensor, its gradient, or another tensor of its shape.
    """
    if name == "pos_embed" and config.model.positions == "rope":
        return {}
    layer, inside, leaf = name.partition(".mlp.")
    names = PROMOE_NAMES if is_promoe(config) else DSMOE_NAMES
    for ours, theirs in names.items():
        if inside and leaf.startswith(ours):
            return {f"{layer}.mlp.{theirs}{leaf.removeprefix(ours)}": tensor}
    prefix = f"{layer}.mlp.experts."
    if leaf.startswith("unconditional_expert."):
        theirs = leaf.removeprefix("unconditional_expert.").replace("fc1", "up_proj").replace("fc2", "down_proj")
        return {f"{prefix}{config.num_experts}.{theirs}": tensor}
    if not leaf.startswith("experts."):
        return {name: tensor}
    weight = leaf.removeprefix("experts.")
    if not is_promoe(config):
        return {f"{prefix}blocks.{e}.{SWIGLU_NAMES[weight]}": matrix for e, matrix in enumerate(tensor)}
    if weight in GELU_NAMES:
        return {f"{prefix}{e}.{GELU_NAMES[weight]}": matrix for e, matrix in enumerate(tensor)}
    views: dict[str, Tensor] = {}
    for expert, biases_1N in enumerate(tensor):
        first, second = biases_1N[0].split([config.expert_hidden, config.size.hidden_size])
        views |= {f"{prefix}{expert}.up_proj.bias": first, f"{prefix}{expert}.down_proj.bias": second}
    return views


def infer_router(
    kind: str, state: dict[str, Tensor], routed: list[int], patch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a published model and of its experts, which weights determine only in part.

    Args:
        kind: one of `ROUTER_KINDS`.
        state: its weights.
        routed: indices of the blocks with experts, in order.
        patch: height and width of a patch.

    Raises:
        CheckpointError: a weight is missing.
        ConfigError: no published model of the kind has this many experts.
    """
    layer = f"blocks.{routed[0]}.mlp."
    one, shared = ("experts.blocks.0", "shared_experts") if kind == "dsmoe" else ("experts.0", "shared_expert")
    hidden = shape_of(state, f"{layer}{one}.up_proj.weight", 2)[0]
    dense = 0 if routed[0] else next((b for b in range(routed[-1] + 2) if f"blocks.{b}.mlp.fc1.weight" in state), None)
    width = shape_of(state, PATCHES, 4)[0]
    ratio = 4 if dense is None else shape_of(state, f"blocks.{dense}.mlp.fc1.weight", 2)[0] / width
    model: dict[str, Any] = {"mlp_ratio": ratio}
    common = {"interleave": 0 not in routed, "moe_intermediate_size": hidden}
    if kind != "dsmoe":
        return model | {
            "input_size": math.isqrt(shape_of(state, "pos_embed", 3)[1]) * patch,
            "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        }, common | {
            "num_routed_experts": shape_of(state, f"{layer}cluster_centers", 2)[0],
            "shared_expert_intermediate_size": shape_of(state, f"{layer}{shared}.up_proj.weight", 2)[0],
            "use_uncond_expert": True, "top_k": 1, "routing_contrastive_lam": 1,
        }  # fmt: skip
    experts = shape_of(state, f"{layer}gate.weight", 2)[0]
    if experts not in PUBLISHED_DSMOE:
        raise ConfigError(
            f"no published DSMoE has {experts} experts in a layer, so the number of experts per token is unknown; give "
            "its configuration with --reference-config."
        )
    k, factor, groups = PUBLISHED_DSMOE[experts]
    norm = "rmsnorm" if "blocks.0.norm1.weight" in state else "layernorm"
    return model | {"input_size": DSMOE_INPUT, "rope_type": "2d", "norm_type": norm}, common | {
        "num_experts": experts, "num_experts_per_tok": k, "use_shared_expert": True,
        "routed_scaling_factor": factor, "n_group": groups, "topk_group": groups,
    }  # fmt: skip
