"""The configuration of a model of the reference implementation, from its own form or from its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from diffmoe_ds.checkpoint.reference_routers import DSMOE_INPUT, ROUTER_KINDS, infer_router, router_sections
from diffmoe_ds.checkpoint.reference_weights import PATCHES, shape_of
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.config.presets import SIZES
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError, ConfigError

KINDS = {"dense": "dense", "tc": "token_choice", "ec": "expert_choice", "diffmoe": "batch_pool"}
"""Model classes of the reference, and our routers."""
EVIDENCE = {
    "dense": "no experts",
    "tc": "linear gates (mlp.gate)",
    "ec": "experts without capacity predictors",
    "diffmoe": "capacity predictors",
    "promoe": "prototypes (mlp.cluster_centers)",
    "promoe_ec": "prototypes (mlp.cluster_centers)",
    "dsmoe": "correction biases (mlp.gate.e_score_correction_bias)",
}
"""What tells the weights of a model class from those of the others."""
SHAPE_KEYS = ("hidden_size", "depth", "num_heads", "input_size", "patch_size", "num_classes")
"""Arguments that every model class of the reference needs, positive integers."""
CAPACITY_WEIGHT = 0.01
"""Default weight of the capacity loss in the reference's class; its published configuration sets 1."""
MLP_RATIO = 4
"""Default of ``mlp_ratio`` in the reference's class."""
LABEL_DROPOUT = 0.1
"""Default of ``class_dropout_prob`` in the reference's class."""
BLOCK = re.compile(r"blocks\.([0-9]{1,4})\.(mlp\.experts\.)?")
"""Start of the name of a weight in a block; the second group matches experts only."""
HEAD = "final_layer.linear.weight"


def reference_config(config: dict[str, Any], state: dict[str, Tensor]) -> Config:
    """Return our configuration of a reference model.

    Args:
        config: the reference's configuration; see `load_official`.
        state: its weights, which decide what the configuration leaves open.

    Raises:
        CheckpointError: the model class is unknown or not supported, or the weights are malformed.
        ConfigError: the configuration is invalid or not supported.
    """
    _check_form(config)
    model, moe = dict(config["model"]), dict(config.get("moe") or {})
    if config.get("kind") not in EVIDENCE:
        raise CheckpointError(f"kind: unknown {short_repr(config.get('kind'))}; valid: {', '.join(EVIDENCE)}.")
    if model.get("head_dim") not in (None, model["hidden_size"] / model["num_heads"]):
        raise CheckpointError("head_dim: a head width other than hidden_size / num_heads is not supported.")
    _check_kind(config["kind"], state)
    tree = {
        "model": _model_section(model, state),
        "routing": {"pool": "rank", "interleave": moe.get("interleave", True)},
        "objective": {"kind": _objective(config, state)},
    }
    if config["kind"] in ROUTER_KINDS:
        changed = router_sections(config["kind"], model, moe)
        changed["routing"] |= {"capacity_predictor": False, "balance_weight": 0}
    else:
        changed = {
            "model": {"mlp": "swiglu" if model.get("use_swiglu") else "gelu"},
            "routing": _routing_section(KINDS[config["kind"]], model, moe, state),
        }
    tree = {name: {**section, **changed.get(name, {})} for name, section in tree.items()}
    return config_from_dict(tree, "the reference's configuration")


def _model_section(model: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "name": "nano-E1",
        "hidden_size": model["hidden_size"],
        "depth": model["depth"],
        "num_heads": model["num_heads"],
        "input_size": model["input_size"],
        "in_channels": model.get("in_channels", shape_of(state, PATCHES, 4)[1]),
        "patch_size": model["patch_size"],
        "num_classes": model["num_classes"],
        "label_dropout": model.get("class_dropout_prob", LABEL_DROPOUT),
        "mlp_ratio": model.get("mlp_ratio", MLP_RATIO),
    }


def _routing_section(kind: str, model: dict[str, Any], moe: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    hidden = int(model["hidden_size"] * model.get("mlp_ratio", MLP_RATIO))
    return {
        "kind": kind,
        "num_experts": moe.get("num_experts"),
        "capacity": moe.get("capacity", 1),
        "shared_experts": _shared_experts(state, hidden, moe.get("n_shared_experts")),
        "capacity_predictor": any(".capacity_predictor." in name for name in state),
        "capacity_weight": model.get("CapacityPred_loss_weight", CAPACITY_WEIGHT),
    }


def _check_form(config: Any) -> None:
    """Check that the reference's configuration has the parts and numbers that ours is computed from.

    Raises:
        ConfigError: it does not.
    """
    sections = config if isinstance(config, Mapping) else {}
    if not isinstance(sections.get("model"), Mapping) or not isinstance(sections.get("moe") or {}, Mapping):
        raise ConfigError(
            "the reference's configuration must be a dict with kind, model and moe, such as "
            f'{{"kind": "diffmoe", "model": {{...}}, "moe": {{...}}}}, got {short_repr(config)}.'
        )
    for key in SHAPE_KEYS:
        value = sections["model"].get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"the reference's configuration: model.{key} must be a positive integer, got {value!r}.")


def infer_reference(
    state: dict[str, Tensor], kind: str | None = None, num_heads: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Infer the reference's configuration from its weights.

    Args:
        state: the reference's ``state_dict``.
        kind: one of `EVIDENCE`; if None, a threshold means diffmoe, a gate module tc, other experts ec, prototypes
            promoe, and correction biases dsmoe.
        num_heads: attention heads, which cannot be inferred; if None, those of the published size of that width.

    Returns:
        The configuration, as in `load_official`, and sentences that say what is a guess.

    Raises:
        CheckpointError: these are not weights of the reference, or the number of heads is unknown.
        ConfigError: the width is not a multiple of ``num_heads``.
    """
    shape = partial(shape_of, state)
    hidden, channels, patch, _ = shape(PATCHES, 4)
    depth = len({match[1] for match in map(BLOCK.match, state) if match})
    routed = sorted({int(match[1]) for match in map(BLOCK.match, state) if match and match[2] == "mlp.experts."})
    kind = _kind(state, bool(routed)) if kind is None else kind
    heads = _heads(depth, hidden, kind) if num_heads is None else num_heads
    if heads < 1 or hidden % heads:
        raise ConfigError(f"--num-heads must divide the width {hidden} of the weights, got {heads}.")
    if kind in ROUTER_KINDS and routed and _kind(state, True) in ROUTER_KINDS:
        model, moe = infer_router(kind, state, routed, patch)
    else:
        model, moe = _infer_experts(state, routed, patch)
    model |= {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "learn_sigma": shape(HEAD, 2)[0] == 2 * channels * patch * patch,
    }
    found: dict[str, Any] = {"kind": kind, "model": model, "moe": moe}
    try:
        reference_config(found, state)
    except ConfigError as error:  # there is no configuration to correct: the weights are wrong
        raise CheckpointError(str(error)) from None
    return found, _guesses(found, num_heads is None)


def _infer_experts(state: dict[str, Tensor], routed: list[int], patch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of a model and its experts; see `infer_router`."""
    first = f"blocks.{routed[0]}.mlp.experts." if routed else "blocks.0.mlp."
    one = f"{first}0." if routed else first
    swiglu = f"{one}gate_proj.weight" in state
    width, hidden = shape_of(state, f"{one}{'gate_proj' if swiglu else 'fc1'}.weight", 2)
    experts = {name.removeprefix(first).split(".")[0] for name in state if routed and name.startswith(first)}
    side = math.isqrt(shape_of(state, "pos_embed", 3)[1])
    model = {"input_size": side * patch, "mlp_ratio": width / hidden, "use_swiglu": swiglu}
    return model, {"num_experts": len(experts), "interleave": 0 not in routed} if routed else {}


def _guesses(found: dict[str, Any], heads_too: bool) -> list[str]:
    """Return sentences that say which values of an inferred configuration the weights do not determine."""
    model, kind = found["model"], found["kind"]
    guesses = [f"{model['num_heads']} attention heads, as in the published model of this size"] if heads_too else []
    if kind in ROUTER_KINDS:
        guesses.append("flow, as most published models of this class")
    elif model["learn_sigma"]:
        guesses.append("DDPM, because the output has twice the channels of the input; flow models can have them too")
    else:
        guesses.append("flow, because the output has as many channels as the input")
    guesses.append(f"{model['num_classes']} classes, because the last label embedding is that of dropped labels")
    if kind == "dsmoe":
        guesses.append(f"latents of {DSMOE_INPUT} by {DSMOE_INPUT}")
        guesses.append(f"{found['moe']['num_experts_per_tok']} experts per token, as published with this many experts")
    elif found["moe"]:
        guesses.append("1 expert per token" if kind in ROUTER_KINDS else "capacity 1")
    return guesses


def _objective(config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Return ``flow`` or ``ddpm``; without ``rf``, a learned variance means DDPM."""
    channels, patch = shape_of(state, PATCHES, 4)[1:3]
    has_variance = shape_of(state, HEAD, 2)[0] == 2 * channels * patch * patch
    learned = config["model"].get("learn_sigma")
    if learned is None:
        learned = has_variance
    is_flow = config.get("rf", config["kind"] in ROUTER_KINDS or not learned)
    if not is_flow and not learned:
        raise ConfigError("learn_sigma: DDPM models without learned variance are not supported.")
    if bool(learned) != has_variance:
        outputs = f"{2 * channels if has_variance else channels} channels for inputs of {channels}"
        raise CheckpointError(f"learn_sigma is {bool(learned)}, but the weights have an output of {outputs}.")
    return "flow" if is_flow else "ddpm"


def _heads(depth: int, hidden: int, kind: str) -> int:
    """Return the attention heads of the published size with this depth and width; DSMoE's have other depths."""
    sizes = [size for size in SIZES.values() if size.hidden_size == hidden and (size.depth == depth or kind == "dsmoe")]
    heads = [size.num_heads for size in sizes]
    if not heads:
        raise CheckpointError(f"{depth} blocks of width {hidden} are not a published size; give --num-heads.")
    return heads[0]


def _kind(state: dict[str, Tensor], has_experts: bool) -> str:
    """Infer the model class from the weights."""
    if not has_experts:
        return "dense"
    if any(name.endswith(".mlp.cluster_centers") for name in state):
        return "promoe"
    if any(name.endswith(".mlp.gate.e_score_correction_bias") for name in state):
        return "dsmoe"
    if any(name.endswith(".mlp.gate.weight") for name in state):
        return "tc"
    predicts = any(name.endswith(".expert_threshold") or ".capacity_predictor." in name for name in state)
    return "diffmoe" if predicts else "ec"


def _check_kind(kind: str, state: dict[str, Tensor]) -> None:
    """Check that weights are of a model class, as most of them have the same names in several.

    Raises:
        CheckpointError: they are of another one.
    """
    found = _kind(state, any(".mlp.experts." in name for name in state))
    if EVIDENCE[found] != EVIDENCE[kind]:
        raise CheckpointError(
            f"the weights are those of the model class {found!r} ({EVIDENCE[found]}), but {kind!r} was requested."
        )


def _shared_experts(state: dict[str, Tensor], hidden: int, expected: int | None) -> int:
    """Return the number of shared experts; the reference's class builds them as one wide FFN.

    Args:
        state: the weights.
        hidden: hidden width of an expert.
        expected: what the configuration says, if it says so.
    """
    first = ("shared_experts.fc1.weight", "shared_experts.up_proj.weight")
    widths = [shape_of(state, name, 2)[0] for name in state if name.endswith(first)]
    width = widths[0] if widths else 0
    if width % hidden:
        raise CheckpointError(f"shared_experts: the width {width} is not a multiple of an expert's width {hidden}.")
    found = width // hidden
    if expected not in (None, found):
        raise CheckpointError(f"n_shared_experts is {expected}, but the weights have {found}.")
    return found
