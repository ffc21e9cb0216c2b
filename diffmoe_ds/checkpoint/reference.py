"""Convert weights of the reference implementation to ours, and our names to its names.

In the reference each expert is a module of its own; ours are stacked.  Everything else has the same name.
"""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.config.presets import SIZES
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.model.dit import DiT, empty_model

KINDS = {"dense": "dense", "tc": "token_choice", "ec": "expert_choice", "diffmoe": "batch_pool"}
"""Model classes of the reference, and our routers."""
CAPACITY_WEIGHT = 0.01
"""Default weight of the capacity loss in the reference's class; its published configuration sets 1."""
SWIGLU_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
GELU_NAMES = {"w1": "fc1", "w2": "fc2"}
IGNORED = ("ema_decay",)
"""Constants that the reference stores with its weights."""
BLOCK = re.compile(r"blocks\.([0-9]{1,4})\.(mlp\.experts\.)?")
"""Start of the name of a weight in a block; the second group matches experts only."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that weights may have."""


def load_official(config: dict[str, Any], state: dict[str, Tensor]) -> DiT:
    """Build our model from the reference's configuration and weights.

    Args:
        config: ``kind`` (dense, tc, ec or diffmoe), and the arguments of its class under ``model`` and ``moe``.
        state: its ``state_dict``.

    Returns:
        The model in training mode, with the thresholds and positions of the weights.  In eval mode it routes like the
        reference (``dynamic`` for DiffMoE).

    Raises:
        CheckpointError: a weight is missing, unknown, has another shape, or is not a dense finite tensor.
        ConfigError: the configuration is invalid or not supported.
    """
    left = {name: value for name, value in state.items() if name.rpartition(".")[2] not in IGNORED}
    for name, value in left.items():
        _check_plain(name, value)
    model = empty_model(reference_config(config, state))
    for name, target in _targets(model):
        if name not in left:
            raise CheckpointError(f"the reference weights lack {name!r}, which a {config['kind']!r} model has.")
        value = left.pop(name)
        if value.shape != target.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(value.shape)}, but the model's is {tuple(target.shape)}.")
        if not value.isfinite().all():
            raise CheckpointError(f"{name!r} holds values that are not finite.")
    if left:
        name = sorted(left)[0]
        raise CheckpointError(f"the reference weights hold {name!r}, which a {config['kind']!r} model lacks.")
    model.to_empty(device="cpu")  # allocate only once the shapes have been checked
    with torch.no_grad():
        for name, target in _targets(model):
            target.copy_(state[name])
    if model.config.routing.kind == "batch_pool" and model.config.num_experts > 1:
        model.set_inference("dynamic")
    return model


def reference_config(config: dict[str, Any], state: dict[str, Tensor]) -> Config:
    """Return our configuration of a reference model.

    Args:
        config: the reference's configuration; see `load_official`.
        state: its weights, which decide what the configuration leaves open.

    Raises:
        CheckpointError: the model class is unknown or not supported.
        ConfigError: the configuration is invalid.
    """
    model, moe = dict(config["model"]), dict(config.get("moe") or {})
    if config.get("kind") not in KINDS:
        raise CheckpointError(f"kind: unknown {config.get('kind')!r}; valid: {', '.join(KINDS)}.")
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


def infer_reference(state: dict[str, Tensor], kind: str | None = None, num_heads: int | None = None) -> dict[str, Any]:
    """Infer the reference's configuration from its weights.

    Args:
        state: the reference's ``state_dict``.
        kind: one of `KINDS`; if None, a threshold means diffmoe, a gate module tc, and other experts ec.
        num_heads: attention heads, which cannot be inferred; if None, those of the published size of that width.

    Raises:
        CheckpointError: these are not weights of the reference, or the number of heads is unknown.
        ConfigError: the width is not a multiple of ``num_heads``.
    """
    shape = partial(_shape_of, state)
    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    depth = len({match[1] for match in map(BLOCK.match, state) if match})
    num_heads = _heads(depth, hidden) if num_heads is None else num_heads
    if num_heads < 1 or hidden % num_heads:
        raise ConfigError(f"--num-heads must divide the width {hidden} of the weights, got {num_heads}.")
    routed = sorted({int(match[1]) for match in map(BLOCK.match, state) if match and match[2] == "mlp.experts."})
    kind = _kind(state, bool(routed)) if kind is None else kind
    first = f"blocks.{routed[0]}.mlp.experts." if routed else "blocks.0.mlp."
    one = f"{first}0." if routed else first
    swiglu = f"{one}gate_proj.weight" in state
    width = shape(f"{one}{'gate_proj' if swiglu else 'fc1'}.weight", 2)[0]
    experts = {name.removeprefix(first).split(".")[0] for name in state if routed and name.startswith(first)}
    found = {
        "kind": kind,
        "model": {
            "input_size": math.isqrt(shape("pos_embed", 3)[1]) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": width / hidden,
            "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
            "learn_sigma": shape("final_layer.linear.weight", 2)[0] == 2 * channels * patch * patch,
            "use_swiglu": swiglu,
        },
        "moe": {"num_experts": len(experts), "interleave": 0 not in routed} if routed else {},
    }
    try:
        reference_config(found, state)
    except ConfigError as error:  # there is no configuration to correct: the weights are wrong
        raise CheckpointError(str(error)) from None
    return found


def _shape_of(state: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"not weights of the reference: {name!r} is missing.")
    return _shape(name, state[name], dimensions)


def _heads(depth: int, hidden: int) -> int:
    """Return the attention heads of the published size with this depth and width."""
    heads = [size.num_heads for size in SIZES.values() if (size.depth, size.hidden_size) == (depth, hidden)]
    if not heads:
        raise CheckpointError(f"{depth} blocks of width {hidden} are not a published size; give --num-heads.")
    return heads[0]


def _kind(state: dict[str, Tensor], has_experts: bool) -> str:
    """Infer the model class from the weights."""
    if not has_experts:
        return "dense"
    if any(name.endswith(".mlp.gate.weight") for name in state):
        return "tc"
    return "diffmoe" if any(name.endswith(".expert_threshold") for name in state) else "ec"


def read_reference(path: Path, weights: str) -> dict[str, Tensor]:
    """Read the weights in a ``.pt`` file of the reference without executing anything in it.

    Args:
        path: a file of ``torch.save``: the weights, or a dictionary with them under ``ema`` or ``model``.
        weights: ``ema`` or ``raw``, where the file holds both.

    Raises:
        CheckpointError: the file cannot be read, or holds no weights, or anything but plain data and tensors.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the reference stores its arguments as one
            # Files of torch before 1.6 are not zip archives and cannot be memory-mapped.
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except Exception as error:  # the type depends on the defect
        # torch's own message advises loading the file without this protection
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        found = f"holds {refused[1]}, which is neither a tensor nor plain data" if refused else "is not a tensor file"
        raise CheckpointError(f"{path}: {found}, so it was not loaded.") from None
    keys = ("ema", "ema_model", "model", "state_dict") if weights == "ema" else ("model", "state_dict")
    for key in keys:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()) or not tree:
        raise CheckpointError(f"{path}: holds no weights under {', '.join(keys)} or at its top level.")
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in tree.items()}


def reference_views(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return views of one of our tensors under the reference's names, one per expert of a stacked weight.

    Args:
        config: the model's configuration.
        name: our parameter's name.
        tensor: the parameter, its gradient, or another tensor of its shape.
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
        elif weight == "w3":  # both biases, concatenated
            hidden = matrix.shape[1] - config.size.hidden_size
            views[f"{prefix}.fc1.bias"], views[f"{prefix}.fc2.bias"] = matrix[0, :hidden], matrix[0, hidden:]
        else:
            views[f"{prefix}.{GELU_NAMES[weight]}.weight"] = matrix
    return views


def _targets(model: DiT) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the reference, tensor to fill) for everything that the reference stores."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield from reference_views(model.config, name, tensor.detach()).items()


def _check_plain(name: str, value: Tensor) -> None:
    """Check that a tensor can be a weight: dense, real, floating-point and fully stored."""
    plain = value.layout == torch.strided and not value.is_nested and value.dtype in DTYPES and not value.is_meta
    # An expanded tensor takes one element on disk and could demand any amount of memory.
    if not plain or value.numel() * value.itemsize > value.untyped_storage().nbytes():
        kind = f"{value.dtype} {value.layout} on {value.device}".replace("torch.", "")
        raise CheckpointError(f"{name!r} is {kind}, but a weight is a dense tensor of floating-point numbers.")


def _shape(name: str, value: Tensor, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a weight, which must have this many dimensions."""
    _check_plain(name, value)
    shape = tuple(value.shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{name!r} has shape {shape}, but it must have {dimensions} dimensions, none of them 0.")
    return shape


def _shared_experts(state: dict[str, Tensor], hidden: int) -> int:
    first = ("shared_experts.fc1.weight", "shared_experts.up_proj.weight")
    widths = [_shape(name, weight, 2)[0] for name, weight in state.items() if name.endswith(first)]
    if not widths:
        return 0
    if widths[0] % hidden:
        raise CheckpointError(f"shared_experts: the width {widths[0]} is not a multiple of an expert's width {hidden}.")
    return widths[0] // hidden
