"""The reference implementation's weights under our names, and ours under its names.

The reference keeps each expert as a module of its own; we stack them.  Everything else has the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import DiT

KINDS = {"dense": "dense", "tc": "token_choice", "ec": "expert_choice", "diffmoe": "batch_pool"}
"""The reference's model classes and our routers."""
CAPACITY_WEIGHT = 0.01
"""The reference class's default weight of the capacity loss; its published configuration sets 1."""
SWIGLU_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
GELU_NAMES = {"w1": "fc1", "w2": "fc2"}
IGNORED = ("ema_decay",)
"""Constants that the reference stores among its weights."""


def load_official(config: dict[str, Any], state: dict[str, Tensor]) -> DiT:
    """A model of ours from the reference's configuration and weights.

    Args:
        config: ``kind`` (dense, tc, ec or diffmoe), ``model`` and ``moe`` with the arguments of its class.
        state: its ``state_dict``.

    Returns:
        The model in training mode, with the thresholds and positions of the weights; in eval mode it routes as
        the reference does (``dynamic`` for DiffMoE).

    Raises:
        CheckpointError: a weight is missing, left over or of another shape.
        ConfigError: the configuration asks for something that we do not have.
    """
    model = DiT(official_config(config, state))
    left = {name: value for name, value in state.items() if name.rpartition(".")[2] not in IGNORED}
    for name, target in _targets(model):
        if name not in left:
            raise CheckpointError(f"the reference weights lack {name!r}, which a {config['kind']!r} model has.")
        value = left.pop(name)
        if value.shape != target.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(value.shape)}, but the model's is {tuple(target.shape)}.")
        with torch.no_grad():
            target.copy_(value)
    if left:
        name = sorted(left)[0]
        raise CheckpointError(f"the reference weights hold {name!r}, which a {config['kind']!r} model lacks.")
    if model.config.routing.kind == "batch_pool" and model.config.num_experts > 1:
        model.set_inference("dynamic")
    return model


def official_config(config: dict[str, Any], state: dict[str, Tensor]) -> Config:
    """Our configuration of a reference model; ``state`` tells what its configuration leaves open."""
    model, moe = dict(config["model"]), dict(config.get("moe") or {})
    if config.get("kind") not in KINDS:
        raise CheckpointError(f"kind: {config.get('kind')!r} is not known; valid: {', '.join(KINDS)}.")
    if model.get("head_dim") is not None:
        raise CheckpointError("head_dim: a head width other than hidden_size / num_heads is not supported.")
    kind = KINDS[config["kind"]]
    hidden = int(model["hidden_size"] * model.get("mlp_ratio", 4))
    tree = {
        "model": {
            "name": "nano-E1",
            "hidden_size": model["hidden_size"],
            "depth": model["depth"],
            "num_heads": model["num_heads"],
            "input_size": model["input_size"],
            "in_channels": model["in_channels"],
            "patch_size": model["patch_size"],
            "num_classes": model["num_classes"],
            "label_dropout": model.get("class_dropout_prob", 0.1),
            "mlp_ratio": model.get("mlp_ratio", 4),
            "mlp": "swiglu" if model.get("use_swiglu") else "gelu",
        },
        "routing": {
            "kind": kind,
            "pool": "rank",
            "num_experts": moe.get("num_experts"),
            "capacity": moe.get("capacity", 1),
            "interleave": moe.get("interleave", True),
            "shared_experts": _shared_experts(state, hidden),
            "capacity_predictor": any(".capacity_predictor." in name for name in state),
            "capacity_weight": model.get("CapacityPred_loss_weight", CAPACITY_WEIGHT),
        },
        "objective": {"kind": "ddpm" if model.get("learn_sigma") else "flow"},
    }
    return config_from_dict(tree, "the reference's configuration")


def official_views(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Our tensor under the reference's names, as views: one per expert of a stacked weight.

    Args:
        config: the model's configuration.
        name: our parameter's name.
        tensor: the parameter, its gradient or anything else of its shape.
    """
    layer, _, leaf = name.partition(".mlp.")
    if leaf == "gate_weight" and config.routing.kind == "token_choice":
        return {f"{layer}.mlp.gate.weight": tensor}
    if not leaf.startswith("experts."):
        return {name: tensor}
    weight = leaf.removeprefix("experts.")
    views = {}
    for expert, matrix in enumerate(tensor):
        prefix = f"{layer}.mlp.experts.{expert}"
        if config.model.mlp == "swiglu":
            views[f"{prefix}.{SWIGLU_NAMES[weight]}.weight"] = matrix
        elif weight == "w3":  # both biases, side by side
            hidden = matrix.shape[1] - config.size.hidden_size
            views[f"{prefix}.fc1.bias"], views[f"{prefix}.fc2.bias"] = matrix[0, :hidden], matrix[0, hidden:]
        else:
            views[f"{prefix}.{GELU_NAMES[weight]}.weight"] = matrix
    return views


def _targets(model: DiT) -> Iterator[tuple[str, Tensor]]:
    """(reference name, where its value belongs) for everything the reference stores."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield from official_views(model.config, name, tensor.detach()).items()


def _shared_experts(state: dict[str, Tensor], hidden: int) -> int:
    first = ("shared_experts.fc1.weight", "shared_experts.up_proj.weight")
    widths = [weight.shape[0] for name, weight in state.items() if name.endswith(first)]
    if not widths:
        return 0
    if widths[0] % hidden:
        raise CheckpointError(f"shared_experts: their width {widths[0]} is not a multiple of an expert's {hidden}.")
    return widths[0] // hidden
