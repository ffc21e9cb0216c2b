"""Initial weights that are the same on any number of ranks.

Every tensor has its own random stream, keyed by the seed and the parameter's name, and every expert has one that is
also keyed by its global index, so 1, 2 or 64 ranks start from the same weights.

Source of the values: DiT (arXiv 2212.09748) and the DiffMoE reference (router weights).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from diffmoe_ds.config.schema import RoutingConfig
from diffmoe_ds.model.conditioning import TextConditioner
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.layers import CrossAttention

GATE_STD = 0.006
"""Standard deviation of router weights, except for ``token_choice``, sigmoids, prototypes and networks."""
EMBEDDING_STD = 0.02
"""Standard deviation of label and time embeddings."""


@torch.no_grad()
def init_weights(model: DiT, seed: int, first_expert: int = 0) -> None:
    """Set every parameter and buffer of a model with uninitialized storage.

    Args:
        model: on a real device (not meta), fp32.
        seed: the run's seed.
        first_expert: global index of the first expert held here.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=_stream(seed, f"{name}.weight"))
            if module.bias is not None:
                module.bias.zero_()
    patch = model.x_embedder.proj
    nn.init.xavier_uniform_(patch.weight.flatten(1), generator=_stream(seed, "x_embedder.proj.weight"))
    assert patch.bias is not None
    patch.bias.zero_()
    class_table = () if model.config.is_text else ("y_embedder.embedding_table",)
    for name in (*class_table, "t_embedder.mlp.0", "t_embedder.mlp.2"):
        weight = model.get_parameter(f"{name}.weight")
        nn.init.normal_(weight, std=EMBEDDING_STD, generator=_stream(seed, f"{name}.weight"))
    for module in [*model.blocks, model.final_layer]:  # adaLN-zero: a block starts as the identity
        module.adaLN_modulation[-1].weight.zero_()
        module.adaLN_modulation[-1].bias.zero_()
    _init_norms(model)
    _init_text(model)
    model.final_layer.linear.weight.zero_()
    model.final_layer.linear.bias.zero_()
    model.reset_positions()
    for index, layer in model.moe_layers().items():
        prefix = f"blocks.{index}.mlp"
        _init_gate(layer.gate_weight, layer.routing, _stream(seed, f"{prefix}.gate_weight"))
        if layer.gate_bias is not None:
            layer.gate_bias.zero_()
        if layer.routing.bias_rate is not None:
            layer.correction_bias.zero_()
        if layer.kind == "expert_race":
            layer.race_threshold.zero_()
        for weight_name, weight in layer.experts.named_parameters():
            if weight_name == "w3" and layer.experts.kind == "gelu":
                weight.zero_()  # biases
                continue
            for local, matrix in enumerate(weight):
                expert = first_expert + local
                nn.init.xavier_uniform_(matrix, generator=_stream(seed, f"{prefix}.experts.{expert}.{weight_name}"))
        if layer.capacity_predictor is not None:
            layer.expert_threshold.zero_()


def _init_norms(model: DiT) -> None:
    """Let norms with weights start without scaling."""
    for module in model.modules():
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and module.weight is not None:
            module.weight.fill_(1)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.bias.zero_()


def _init_text(model: DiT) -> None:
    """Set what only text models have: a block starts without cross-attention, and the null condition is set later."""
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.proj.weight.zero_()
    if isinstance(model.y_embedder, TextConditioner):
        model.y_embedder.null_row.zero_()


def _init_gate(weight_ED: Tensor, routing: RoutingConfig, stream: torch.Generator) -> None:
    if routing.affinity == "mlp":
        nn.init.xavier_uniform_(weight_ED, generator=stream)
    elif routing.affinity == "cosine":
        nn.init.normal_(weight_ED, std=1 / math.sqrt(weight_ED.shape[1]), generator=stream)  # of length 1
    elif routing.score == "sigmoid":  # DSMoE
        nn.init.kaiming_normal_(weight_ED, generator=stream)
    elif routing.kind == "token_choice":
        bound = 1 / math.sqrt(weight_ED.shape[1])
        nn.init.uniform_(weight_ED, -bound, bound, generator=stream)
    else:
        nn.init.normal_(weight_ED, std=GATE_STD, generator=stream)


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
