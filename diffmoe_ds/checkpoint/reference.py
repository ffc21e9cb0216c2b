"""Convert weights of the reference implementation to ours, and our names to its names.

In the reference each expert is a module of its own; ours are stacked.  Everything else has the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.reference_config import HEAD, reference_config
from diffmoe_ds.checkpoint.reference_routers import is_dsmoe, is_promoe, router_views
from diffmoe_ds.checkpoint.reference_weights import check_plain
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import DiT, empty_model

SWIGLU_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
GELU_NAMES = {"w1": "fc1", "w2": "fc2"}
IGNORED = ("ema_decay",)
"""Constants that the reference stores with its weights."""


def load_official(config: dict[str, Any], state: dict[str, Tensor]) -> DiT:
    """Build our model from the reference's configuration and weights.

    >>> config["kind"], config["model"]["hidden_size"], config["moe"]["num_experts"]
    ('diffmoe', 32, 4)
    >>> model = load_official(config, state).eval()
    >>> model(x, t, y).prediction.shape
    torch.Size([4, 4, 8, 8])

    Args:
        config: ``kind`` (dense, tc, ec or diffmoe; promoe, promoe_ec or dsmoe for the models of these papers), the
            arguments of its class under ``model`` and ``moe``, and optionally ``rf``, whether it is a flow model;
            otherwise, one without a learned variance is, and those of the other papers are.
        state: its ``state_dict``. A flow model may predict a variance, which the reference ignores.

    Returns:
        The model in training mode, with the thresholds and positions of the weights.  In eval mode it routes like the
        reference (``dynamic`` for DiffMoE).

    Raises:
        CheckpointError: the weights are of another model class, or one is missing, unknown, has another shape, or is
            not a dense finite tensor.
        ConfigError: the configuration is invalid or not supported.
    """
    left = {name: value for name, value in state.items() if name.rpartition(".")[2] not in IGNORED}
    for name, value in left.items():
        check_plain(name, value)
    model = empty_model(reference_config(config, state))
    if model.config.objective.kind == "flow":
        left |= _without_variance(left, model)
    for name, target in _targets(model):
        if name not in left:
            raise CheckpointError(f"the reference weights lack {name!r}, which a {config['kind']!r} model has.")
        value = left[name]
        if value.shape != target.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(value.shape)}, but the model's is {tuple(target.shape)}.")
        if not value.isfinite().all():
            raise CheckpointError(f"{name!r} holds values that are not finite.")
    surplus = left.keys() - {name for name, _ in _targets(model)}
    if surplus:
        name = min(surplus)
        raise CheckpointError(f"the reference weights hold {name!r}, which a {config['kind']!r} model lacks.")
    model.to_empty(device="cpu")  # allocate only once the shapes have been checked
    model.reset_positions()
    with torch.no_grad():
        for name, target in _targets(model):
            target.copy_(left[name])
    if model.config.routing.kind == "batch_pool" and model.config.num_experts > 1:
        model.set_inference("dynamic")
    return model


def reference_views(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return views of one of our tensors under the reference's names, one per expert of a stacked weight.

    Args:
        config: the model's configuration.
        name: our parameter's name.
        tensor: the parameter, its gradient, or another tensor of its shape.
    """
    if is_promoe(config) or is_dsmoe(config):
        return router_views(config, name, tensor)
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


def _without_variance(state: dict[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """Return the weights of the last layer for the first half of the channels, if they are for twice the model's."""
    found = {}
    for name in (HEAD, HEAD.replace("weight", "bias")):
        value, channels = state.get(name), model.out_channels
        pixels = model.patch_size**2
        if value is not None and value.ndim and len(value) == 2 * channels * pixels:
            found[name] = value.unflatten(0, (pixels, 2 * channels))[:, :channels].flatten(0, 1)
    return found
